"""VLMEvalKit: any of its models that run in Hugging Face, ablated.

python -c "import runpy; from miner_lens.harnesses.vlmeval import register
register('Qwen2-VL-7B-Instruct', 'image.safetensors', at='image')
runpy.run_path('run.py', run_name='__main__')" --model Qwen2-VL-7B-Instruct-ablated --data MMStar
"""

from functools import partial

from miner_lens.harnesses.ablated import ablated
from miner_lens.neurons.ablation import Neurons
from miner_lens.neurons.writing import Value

METHODS = ("generate_inner", "chat_inner")


def register(
    name: str, neurons: Neurons | str, value: Value = "zero", at: str | None = None
) -> str:
    """Add a model of VLMEvalKit's list to it once more, ablated, and say under which name."""
    from vlmeval.config import supported_VLM

    make = supported_VLM[name]
    ablation = {"neurons": neurons, "value": value, "at": at}
    known = partial(ablated(make.func, METHODS), *make.args, **make.keywords, **ablation)
    supported_VLM[f"{name}-ablated"] = known
    return f"{name}-ablated"

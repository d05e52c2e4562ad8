"""EleutherAI's lm-evaluation-harness: its models `hf` and `hf-multimodal`, ablated.

python -m miner_lens.harnesses.lm_eval --model hf-ablated \
    --model_args pretrained=folder,neurons=image.safetensors,value=min --tasks arc_easy
"""

from lm_eval.__main__ import cli_evaluate
from lm_eval.api.registry import register_model
from lm_eval.models.hf_vlms import HFMultimodalLM
from lm_eval.models.huggingface import HFLM

from miner_lens.harnesses.ablated import ablated

METHODS = ("loglikelihood", "loglikelihood_rolling", "generate_until")

AblatedHF = register_model("hf-ablated")(ablated(HFLM, METHODS))
AblatedMultimodal = register_model("hf-multimodal-ablated")(ablated(HFMultimodalLM, METHODS))

if __name__ == "__main__":
    cli_evaluate()

"""lm-evaluation-harness asks an ablated model, as its model hf-multimodal-ablated does."""

from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.models.hf_vlms import HFMultimodalLM
from PIL import Image

import miner_lens as ml
from miner_lens.harnesses.lm_eval import AblatedMultimodal

path = str(ml.organisms.path("shapes"))
bridge = ml.load(path, device="cpu")
data = ml.datasets.load("easy-vqa", limit=20)
neurons = ml.NeuronSet.union(ml.mine(bridge, data).select(ratio=0.8))


def request(number: int, messages: Any) -> Instance:
    """A question as one of the harness's tasks would ask it."""
    prompt = bridge.processor.apply_chat_template(messages, add_generation_prompt=True)
    images = [part["image"] for part in messages[0]["content"] if part["type"] == "image"]
    options = {"until": ["\n"], "max_gen_toks": 4, "do_sample": False}
    visuals = {"visual": [Image.open(image).convert("RGB") for image in images]}
    return Instance("generate_until", {}, (prompt, options, visuals), number)


requests = [request(number, sample.messages) for number, sample in enumerate(data[:4])]
options = {"device": "cpu", "batch_size": 2}
plain = HFMultimodalLM(path, **options)
plain.model.processor = plain.processor
intact = plain.generate_until(requests, disable_tqdm=True)
with ml.ablate(plain.model, neurons, "min"):
    expected = plain.generate_until(requests, disable_tqdm=True)

model = AblatedMultimodal(path, neurons=neurons, value="min", **options)
assert model.generate_until(requests, disable_tqdm=True) == expected
assert expected != intact
print(f"{len(neurons)} neurons at the minimum of their layer:")
for sample, one, other in zip(data[:4], intact, expected, strict=True):
    print(f"{sample.answers[0]}: {one}, ablated {other}")

"""nnsight reads and writes the model that is under an ablation, and can write the same itself."""

import torch
from nnsight import NNsight

import miner_lens as ml

bridge = ml.load("shapes", device="cpu")
data = ml.datasets.load("easy-vqa", limit=20)
neurons = ml.mine(bridge, data).select(ratio=0.1)["image"]
inputs = ml.inputs(bridge, data[0].messages)
inputs["input_ids"] = inputs.pop("input")
plain = ml.unwrap(bridge)  # nnsight takes a Hugging Face model as it is
model = NNsight(plain)

with torch.no_grad(), ml.ablate(plain, neurons):
    expected = plain(**inputs).logits
    with model.trace(**inputs):  # nnsight sees what is ablated ...
        traced = model.output.logits.save()
assert torch.equal(traced, expected)

with torch.no_grad(), model.trace(**inputs):  # ... and can ablate by itself
    for layer, index in neurons.by_layer().items():
        model.model.language_model.layers[layer].mlp.act_fn.output[..., index] = 0
    written = model.output.logits.save()
assert torch.equal(written, expected)
with torch.no_grad():
    change = (expected - plain(**inputs).logits).abs().max().item()
print(f"{len(neurons)} neurons off, by nnsight as by ml.ablate; logits move by up to {change:.3f}")

"""pyvene intervenes on the same neurons; it removes all hooks, so open ablate after it."""

import pyvene
import torch

import miner_lens as ml

bridge = ml.load("shapes", device="cpu")
data = ml.datasets.load("easy-vqa", limit=20)
neurons = ml.mine(bridge, data).select(ratio=0.1)["image"]
inputs = ml.inputs(bridge, data[0].messages)
inputs["input_ids"] = inputs.pop("input")
plain = ml.unwrap(bridge)  # pyvene takes a Hugging Face model as it is


def switch_off(index: torch.Tensor) -> object:
    """What pyvene is to do with a layer's activations."""

    def intervention(base: torch.Tensor, source: object) -> torch.Tensor:
        return base.index_fill(-1, index, 0)

    return intervention


representations = [
    {
        "component": f"model.language_model.layers[{layer}].mlp.act_fn.output",
        "intervention": switch_off(index),
    }
    for layer, index in neurons.by_layer().items()
]
model = pyvene.IntervenableModel(representations, model=plain)
with torch.no_grad():
    _, by_pyvene = model(inputs)
    with ml.ablate(plain, neurons):
        expected = plain(**inputs).logits
    change = (expected - plain(**inputs).logits).abs().max().item()
assert torch.equal(by_pyvene.logits, expected)
print(f"{len(neurons)} neurons off, by pyvene as by ml.ablate; logits move by up to {change:.3f}")

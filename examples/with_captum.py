"""captum attributes an answer to neurons of the model, intact and under an ablation."""

import torch
from captum.attr import LayerActivation, LayerFeatureAblation

import miner_lens as ml

bridge = ml.load("shapes", device="cpu")
data = ml.datasets.load("easy-vqa", limit=20)
neurons = ml.mine(bridge, data).select(ratio=0.1)["image"]
inputs = ml.inputs(bridge, data[0].messages)
tokens = inputs["input"]
model = bridge.original_model
layer, index = next(iter(neurons.by_layer().items()))
of_layer = neurons & ml.NeuronSet.of([(layer, neuron) for neuron in index.tolist()], bridge)
activation = model.get_decoder().layers[layer].mlp.act_fn


def answer(ids: torch.Tensor) -> torch.Tensor:
    """The logit of the most probable answer; captum passes tokens, and bind the image."""
    best: torch.Tensor = model(input_ids=ids).logits[:, -1].max(-1).values
    return best


with torch.no_grad(), ml.bind(bridge, inputs):
    # captum's own ablation: the layer's chosen neurons are one feature, the others none.
    features = torch.zeros(1, 1, of_layer.neurons, dtype=torch.long)
    features[..., index] = 1
    by_captum = LayerFeatureAblation(answer, activation).attribute(tokens, layer_mask=features)
    with ml.ablate(bridge, of_layer):
        ablated = answer(tokens)
        seen = LayerActivation(answer, activation).attribute(tokens)
    assert torch.equal(answer(tokens) - ablated, by_captum[0, 0, index[0]][None])
assert not seen[..., index].any()  # captum sees what is ablated
effect = by_captum[0, 0, index[0]].item()
print(f"{len(of_layer)} neurons of layer {layer} off: the answer's logit loses {effect:.3f}")

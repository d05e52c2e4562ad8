"""PEFT: neurons of a model with an adapter, which is another model than the one without."""

import torch
from peft import LoraConfig, get_peft_model

import miner_lens as ml

bridge = ml.load("shapes", device="cpu")
data = ml.datasets.load("easy-vqa", limit=20)
neurons = ml.mine(bridge, data).select(ratio=0.1)["image"]
inputs = ml.inputs(bridge, data[0].messages)
inputs["input_ids"] = inputs.pop("input")

torch.manual_seed(0)
config = LoraConfig(target_modules=["gate_proj", "down_proj"], init_lora_weights=False)
model = get_peft_model(ml.unwrap(bridge), config).eval()
try:
    ml.ablate(model, neurons).__enter__()
except ValueError as error:
    print(f"Refused: {error}\n")
same = neurons.transfer(model)  # the same places all the same

with torch.no_grad():
    with ml.ablate(model, same):
        expected = model(**inputs).logits
    # By hand: a hook of one's own on each activation function.
    handles = [
        model.get_base_model()
        .get_decoder()
        .layers[layer]
        .mlp.act_fn.register_forward_hook(
            lambda module, args, x, index=index: x.index_fill(-1, index, 0)
        )
        for layer, index in same.by_layer().items()
    ]
    assert torch.equal(model(**inputs).logits, expected)
    for handle in handles:
        handle.remove()
    with model.disable_adapter(), ml.ablate(model, neurons):
        without = model(**inputs).logits
    change = (expected - without).abs().max().item()
print(f"{len(same)} neurons off; the adapter moves their model's logits by up to {change:.3f}")

"""miner-lens inside TransformerLens: its hooks, its caches, its bridges."""

import torch
from transformer_lens.model_bridge import TransformerBridge

import miner_lens as ml

# A bridge that TransformerLens made itself; importing miner_lens taught it Qwen2-VL.
model = TransformerBridge.boot_transformers(str(ml.organisms.path("shapes")), device="cpu")
(sample,) = ml.datasets.load("easy-vqa", limit=1)
inputs = ml.inputs(model, sample.messages)
tokens = inputs.pop("input")

# An analyzer hands its hooks to run_with_hooks.
analyzer = ml.ImportanceAnalyzer()
model.run_with_hooks(tokens, fwd_hooks=analyzer.hooks(model), **inputs)
msns = analyzer.result().select(ratio=0.05)

# An ablation can be a list of hooks ...
logits = model(tokens, **inputs)[0, -1]
hooks = ml.ablation_hooks(model, msns["image"])
by_hooks = model.run_with_hooks(tokens, fwd_hooks=hooks, **inputs)[0, -1]

# ... or a context, inside which caches and other hooks see the ablated model.
with ml.ablate(model, msns["image"]):
    by_context, cache = model.run_with_cache(tokens, **inputs)
assert torch.equal(by_hooks, by_context[0, -1])

for layer, index in msns["image"].by_layer().items():
    assert not cache[f"blocks.{layer}.mlp.act.hook_out"][..., index].any()
change = (by_hooks - logits).abs().max().item()
print(f"{len(msns['image'])} neurons off; the last logits move by up to {change:.3f}")

"""circuitsvis draws attention patterns of the ablated model, media and all."""

from pathlib import Path
from tempfile import mkdtemp

import circuitsvis
import torch

import miner_lens as ml

POINT = "blocks.5.attn.hook_pattern"

model = ml.load("shapes", device="cpu")
data = ml.datasets.load("easy-vqa", limit=20)
neurons = ml.mine(model, data).select(ratio=0.1)["image"]
inputs = ml.inputs(model, data[0].messages)
tokens = inputs["input"]
words = model.processor.tokenizer.convert_ids_to_tokens(tokens[0])

hooks = ml.ablation_hooks(model, neurons)
kept = []
with torch.no_grad(), ml.bind(model, inputs):
    with ml.ablate(model, neurons):
        _, cache = model.run_with_cache(tokens, names_filter=[POINT])
    model.run_with_hooks(tokens, fwd_hooks=[*hooks, (POINT, lambda x, hook: kept.append(x))])
pattern = cache[POINT]
assert torch.equal(pattern, kept[0])

picture = circuitsvis.attention.attention_patterns(tokens=words, attention=pattern[0])
page = Path(mkdtemp(), "patterns.html")
page.write_text(str(picture))
print(
    f"{pattern.shape[1]} heads of layer 5, {len(neurons)} neurons off: {page.stat().st_size} bytes"
)

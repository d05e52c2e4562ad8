"""Do other samples, and other data, give a small Qwen2-VL the same modality-specific neurons?"""

import miner_lens as ml

model = ml.load("shapes")
sets = {name: ml.datasets.load(name, limit=16) for name in ("easy-vqa", "digits")}

# Each data set in parts, of which halves are made; nothing is mined twice.
parts = {
    name: [ml.mine(model, data[n::4], batch_size=4, progress=False) for n in range(4)]
    for name, data in sets.items()
}
found = ml.experiments.stability(parts, ratio=0.05, repeats=10)
print(found.matrix("image").round(2))
print(found.summary)

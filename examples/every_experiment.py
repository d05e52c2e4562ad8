"""The experiments side by side: each takes a model, data and scores, and says a sentence."""

import miner_lens as ml

model = ml.load("shapes")
asked = {ask: ml.datasets.load("easy-vqa", limit=8, ask=ask) for ask in ("image", "text")}
mined = {ask: ml.mine(model, some[:4], progress=False) for ask, some in asked.items()}
scores = ml.ImportanceScores.mean(mined.values())
others = {ask: some[4:] for ask, some in asked.items()}
msns = scores.select(ratio=0.05)
do = ml.experiments

# Nothing is switched off.
parts = [ml.mine(model, asked["image"][n : n + 2], progress=False) for n in range(0, 8, 2)]
found = [
    ml.evaluate(model, others, max_new_tokens=2),
    do.layer_distribution(msns),
    do.overlap(msns),
    do.stability(parts, ratio=0.05, repeats=2),
    do.attention_effect(model, asked["image"][:4], ratio=0.05, progress=False),
    do.recovery([ml.organisms.planted("plain", samples=8)], ["LA_MU", "contrastive"]),
]

# Neurons are.
found += [
    do.ablation_table(model, others, scores, 0.05, seeds=[0], progress=False),
    do.ratio_sweep(model, others, scores, [0.02, 0.1], seeds=[0], progress=False),
    do.selection_grid(model, others, scores, 0.05, ["LA_MU", "lape"], progress=False),
    do.ablation_values(model, others, scores, ["zero", "mean"], 0.05, seeds=[0], progress=False),
    do.transfer(model, others, mined, ratio=0.05, seeds=[0], progress=False),
    do.necessity(model, others, scores, ["image"], [0, 0.1, 1], seeds=[0], progress=False),
]
for one in found:
    print(f"{type(one).__name__}: {one.summary}")

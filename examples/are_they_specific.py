"""Are a small Qwen2-VL's image neurons specific, or just important? Ask the same in two ways."""

import miner_lens as ml

model = ml.load("shapes")
asked = {ask: ml.datasets.load("easy-vqa", limit=40, ask=ask) for ask in ("image", "text")}

# Mined on some questions, tried on others.
mined = [ml.mine(model, some[:20], batch_size=10) for some in asked.values()]
scores = ml.ImportanceScores.mean(mined)
others = {ask: some[20:] for ask, some in asked.items()}

found = ml.experiments.specificity(model, others, scores, ratio=0.05)
print(found.matrix().round(3))
print(found.summary)

# The same question to neurons that stand out from the other modalities.
contrast = ml.experiments.specificity(model, others, scores, 0.05, "contrastive")
print(contrast.summary)

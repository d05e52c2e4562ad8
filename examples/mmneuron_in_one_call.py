"""MMNeuron's protocol in one call: domain neurons, where they lie, what they cost, the lens."""

import tempfile

import miner_lens as ml

model = ml.load("shapes")
data = {name: ml.datasets.load(name, limit=12) for name in ("easy-vqa", "digits")}

with tempfile.TemporaryDirectory() as folder:
    found = ml.experiments.mmneuron(
        model, data, folder, tried=4, top_rate=0.05, seeds=1, progress=False
    )
    # Called again, it reads what is there.
    again = ml.experiments.mmneuron(
        model, data, folder, tried=4, top_rate=0.05, seeds=1, progress=False
    )
print(found.summary)
print(found.matrix.matrix().round(2))
print(again.summary == found.summary)

"""Do image and text tokens come nearer to one another from layer to layer? With a shuffled null."""

import miner_lens as ml

model = ml.load("shapes")
data = ml.datasets.load("easy-vqa", limit=16, ask="image")

states = ml.run(model, data, ml.ConvergenceAnalyzer(), batch_size=8, progress=False)
print(states)
table = states.curves(["cka", "distance", "separability"], [("text", "image")], shuffles=5)
for measure, rows in table.groupby("measure"):
    print(measure)
    print(
        rows[["layer", "mean", "low", "high", "null", "null_high"]].round(3).to_string(index=False)
    )

"""MINER's protocol in one call: mined, selected, switched off, and a report of it."""

import tempfile
from dataclasses import replace
from pathlib import Path

import miner_lens as ml

model = ml.load("shapes")
# The whole protocol takes minutes here, hours with the paper's data: a part of it, on few samples.
protocol = replace(
    ml.experiments.MINER.on("shapes"), ratios=(0.05,), strategies=("LA_MU",), seeds=(0,)
)

with tempfile.TemporaryDirectory() as folder:
    results = ml.experiments.reproduce(model, protocol, folder, limit=2, progress=False)
    print(ml.report(results, Path(folder, "report.html")).stat().st_size, "bytes of report")
for name in ("ablation-table", "ratio-sweep", "selection-grid", "ablation-values"):
    print(results[name].summary)

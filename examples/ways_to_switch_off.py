"""What to write into the neurons, and where: accuracy under each kind of ablation."""

from typing import Any

from rich.console import Console
from rich.table import Table

import miner_lens as ml

model = ml.load("shapes")
data = ml.datasets.load("easy-vqa", limit=60)
neurons = ml.mine(model, data, batch_size=10).select(ratio=0.1)["image"]

ways: dict[str, dict[str, Any]] = {
    "zero": {},
    "the layer's minimum": {"value": "min"},
    "each neuron's mean": {"value": "mean"},
    "zero, at image tokens only": {"at": "image"},
    "zero, at text tokens only": {"at": "text"},
    "zero, all neurons but these": {"complement": True},
}
table = Table("written", "accuracy", title=f"{len(neurons)} image neurons")
table.add_row("nothing", f"{ml.accuracy(model, data):.2f}")
for name, options in ways.items():
    with ml.ablate(model, neurons, **options):
        table.add_row(name, f"{ml.accuracy(model, data):.2f}")
Console().print(table)

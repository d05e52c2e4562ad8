"""All that is known of one neuron, and everything on a page that opens without a network."""

from pathlib import Path
from tempfile import mkdtemp

import miner_lens as ml

model = ml.load("shapes")
data = ml.datasets.load("easy-vqa", limit=6, ask="both")
scores = ml.mine(model, data, batch_size=6, progress=False)
msns = scores.select(ratio=0.02)

layer, neuron = next(iter(msns["image"]))
card = ml.card(model, data, layer, neuron, scores=[scores], k=2, progress=False)
print(card.summary)

results = {"scores": scores, "neurons": msns, "an image neuron": card}
page = ml.report(results, Path(mkdtemp(), "report.html"), "Image neurons of shapes")
print(f"{page}: {page.stat().st_size / 1e6:.1f} MB")

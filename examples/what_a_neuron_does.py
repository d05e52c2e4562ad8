"""Four ways to say what a neuron does for the answer, side by side."""

import torch

import miner_lens as ml

model = ml.load("shapes")
data = ml.datasets.load("easy-vqa", limit=4, ask="both")

# One pass for three of them; integrated gradients take several.
gradient, contribution, kinds = ml.run(
    model,
    data,
    ml.AttributionAnalyzer(),
    ml.ContributionAnalyzer(),
    ml.KindAnalyzer(),
    batch_size=4,
    progress=False,
)
integrated = ml.integrated_gradients(
    model, data, steps=12, modalities=["text"], batch_size=4, progress=False
)
print(kinds)
print("text:", integrated.info["completeness"]["text"])

scores = {"gradient": gradient, "integrated": integrated, "contribution": contribution}
flat = torch.stack([one["text"][0].flatten() for one in scores.values()])
print("correlation at text tokens of", ", ".join(scores))
print(torch.corrcoef(flat))

"""Domain-specific neurons (MMNeuron), of the decoder and the vision tower, off and turned up."""

import miner_lens as ml

model = ml.load("shapes")
domains = {
    "pictures": ml.datasets.load("easy-vqa", limit=60, ask="image"),
    "digits": ml.datasets.load("digits", limit=60),
}

# One pass counts both sites.
llm, vision = ml.run(
    model,
    {name: samples[:40] for name, samples in domains.items()},
    ml.DomainAnalyzer(),
    ml.DomainAnalyzer(site="vision"),
    batch_size=20,
    progress=False,
)
print(llm)

selected = [llm.select(top_rate=0.05), vision.select(top_rate=0.05)]
for neurons in selected:
    print(ml.experiments.layer_distribution(neurons).summary)
    print(ml.experiments.overlap(neurons).summary)

# Each domain without each domain's neurons, beside random neurons, on other samples.
rest = {name: samples[40:] for name, samples in domains.items()}
matrix = ml.domain_matrix(model, rest, *selected, seeds=2, progress=False)
print(matrix)
table = matrix.to_frame()
print(table.loc[table["measure"] == "logprob", ["off", "sites", "on", "difference", "p_holm"]])

with ml.scale(model, selected[0]["digits"], by=2.0):
    print("turned up:", ml.accuracy(model, rest["pictures"]))

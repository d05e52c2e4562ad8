"""Do MINER's metrics rank neurons as their effect on the answer does?"""

import miner_lens as ml

model = ml.load("shapes")
asked = {ask: ml.datasets.load("easy-vqa", limit=16, ask=ask) for ask in ("image", "text")}
first = [sample for some in asked.values() for sample in some[:8]]
held_out = {ask: some[8:] for ask, some in asked.items()}

scores, attribution = ml.run(
    model,
    first,
    ml.ImportanceAnalyzer(),
    ml.AttributionAnalyzer(),
    batch_size=8,
    progress=False,
)
found = ml.experiments.metric_comparison(
    model, held_out, scores, attribution, ratio=0.05, progress=False
)
for table in (found.agreement, found.predictions, found.specificity):
    print(table.round(2).to_string(index=False))
print(found.summary)

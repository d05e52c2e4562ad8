"""Do image tokens reach out towards text, and do special tokens stand at both ends of it?"""

import miner_lens as ml

model = ml.load("shapes")
data = ml.datasets.load("easy-vqa", limit=24, ask="image")

reach = ml.run(model, data, ml.SemanticReachAnalyzer(), batch_size=8, progress=False)
print(reach)
table = reach.curves()
table["beyond the null"] = table["low"] > table["null_high"]
for measure, rows in table.groupby("measure"):
    print(measure)
    print(rows.drop(columns=["measure", "samples"]).round(2).to_string(index=False))

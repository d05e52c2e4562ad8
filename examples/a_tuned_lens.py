"""Fit a tuned lens, see on other data whether it is nearer to the last layer, and look through."""

import miner_lens as ml

model = ml.load("shapes")
data = ml.datasets.load("easy-vqa", limit=60, ask="both")

tuned = ml.run(model, data[:48], ml.TunedLensAnalyzer(), batch_size=8, progress=False)
print(tuned)
found = ml.run(model, data[48:], ml.LensDivergenceAnalyzer(tuned), batch_size=6, progress=False)
print(found)
plain, through = ml.run(
    model,
    data[48:],
    ml.LogitLensAnalyzer(),
    ml.LogitLensAnalyzer(tuned),
    batch_size=6,
    progress=False,
)
print("the answer's probability at the last token, plain:", plain.of("last", "answer").mean(0))
print("and through the tuned lens:", through.of("last", "answer").mean(0))

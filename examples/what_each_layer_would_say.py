"""The logit lens: what each layer would answer, and how sure it is at each modality's tokens."""

import miner_lens as ml

model = ml.load("shapes")
data = ml.datasets.load("easy-vqa", limit=40, ask="both")

print(data[0].answers, ml.logit_lens(model, data[0].messages, k=3))

lens = ml.run(model, data, ml.LogitLensAnalyzer(), batch_size=8, progress=False)
print(lens)
print(lens.curves().query("modality == 'last' and measure == 'answer'"))
for modality, found in lens.stages().items():
    print(f"entropy of {modality} changes its course at", found)
print("image tokens become, in the last layer:", lens.top_tokens("image", 3)[-1])

"""In which layers does the last token read the image? Attention knockout by windows of layers."""

import miner_lens as ml

model = ml.load("shapes")
data = ml.datasets.load("easy-vqa", limit=12, ask="image")

flow = ml.information_flow(model, data, ["image", "text"], window=2, progress=False)
print(flow)
print(flow.curves().query("measure == 'logprob'")[["modality", "layer", "mean", "low", "high"]])

# The same without some neurons, here random ones.
neurons = ml.NeuronSet.random(200, like=ml.NeuronSet.of([], model))
with ml.ablate(model, neurons):
    print(ml.information_flow(model, data, ["image"], window=2, progress=False))

# The same to first order, in one pass: attention times its gradient, in nats.
paid = ml.run(model, data, ml.AttentionFlowAnalyzer(), batch_size=4, progress=False)
print(paid)
print(paid.curves().query("measure == 'effect'")[["modality", "layer", "mean", "low", "high"]])
with ml.ablate(model, neurons):
    print(ml.run(model, data, ml.AttentionFlowAnalyzer(), batch_size=4, progress=False))

with ml.knockout(model, "image"):
    print("no image anywhere:", ml.accuracy(model, data))

"""The same question about two pictures: where is the difference, and do image neurons carry it?"""

import miner_lens as ml

model = ml.load("shapes")
data = ml.datasets.load("easy-vqa", limit=150)
pairs = ml.counterfactuals(data, limit=6)
print([(one.answers[0], other.answers[0]) for one, other in pairs])

patching = ml.activation_patching(model, pairs, progress=False)
print(patching)
print(patching.curves().query("modality == 'last'"))

msns = ml.mine(model, data[:20], batch_size=10, progress=False).select(ratio=0.1)
controls = {f"like {name}": ml.NeuronSet.random_like(some) for name, some in msns.items()}
print(ml.activation_patching(model, pairs, msns | controls, progress=False).curves())

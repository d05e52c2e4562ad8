"""Mine a small trained Qwen2-VL, switch its image neurons off, ask again."""

import miner_lens as ml

model = ml.load("shapes")
data = ml.datasets.load("easy-vqa", limit=50)

scores = ml.mine(model, data)
print(scores)

msns = scores.select(ratio=0.02, strategy="LA_MU")
for modality, neurons in msns.items():
    print(f"{modality}: {neurons}")

question = data[0]
print("intact: ", ml.generate(model, question.messages, max_new_tokens=4))
with ml.ablate(model, msns["image"]):
    print("ablated:", ml.generate(model, question.messages, max_new_tokens=4))

print("accuracy, intact: ", ml.accuracy(model, data))
with ml.ablate(model, msns):
    print("accuracy, ablated:", ml.accuracy(model, data))

"""One run shared by as many processes as the launcher starts.

python examples/many_processes.py
torchrun --nproc-per-node 2 examples/many_processes.py
accelerate launch --num-processes 2 examples/many_processes.py
srun --ntasks 2 python examples/many_processes.py
"""

import os

import miner_lens as ml

model = ml.load("shapes")
data = ml.datasets.load("easy-vqa", limit=60, ask="both")
scores = ml.mine(model, data, batch_size="auto", checkpoint=os.environ.get("CHECKPOINT"))

if scores is not None:  # rank 0 has the result, the others have None
    print(scores)
    print(scores.select(ratio=0.02)["image"])

"""One run shared by as many processes as the launcher starts.

python examples/many_processes.py
torchrun --nproc-per-node 2 examples/many_processes.py
accelerate launch --num-processes 2 examples/many_processes.py
srun --ntasks 2 python examples/many_processes.py
"""

import os

import miner_lens as ml
from miner_lens.launchers import rank

model = ml.load("shapes")
data = ml.datasets.load("easy-vqa", limit=60, ask="both")
scores = ml.mine(model, data, batch_size="auto", checkpoint=os.environ.get("CHECKPOINT"))

if rank() == 0:  # all have the result; one is enough to print it
    print(scores)
    print(scores.select(ratio=0.02)["image"])

"""What torchrun, accelerate and srun tell a process about itself."""

from __future__ import annotations

import os
import re

PORTS = range(15_000, 30_000)  # below those that systems hand out by themselves


def launcher() -> tuple[int, int, str] | None:
    """Rank, number of ranks, and where they meet as torch.distributed reads it.

    torchrun and accelerate set `RANK` and its kin. srun sets its own for each process of a step;
    the variables of a whole SLURM job, which a batch script has too, do not count.
    """
    variables = os.environ
    if "RANK" in variables and "WORLD_SIZE" in variables:
        rank, world, meeting = int(variables["RANK"]), int(variables["WORLD_SIZE"]), "env://"
    elif "SLURM_PROCID" in variables and "SLURM_STEP_NUM_TASKS" in variables:
        rank, world = int(variables["SLURM_PROCID"]), int(variables["SLURM_STEP_NUM_TASKS"])
        nodes = variables.get("SLURM_STEP_NODELIST") or variables.get("SLURM_NODELIST", "")
        host = variables.get("MASTER_ADDR") or first_host(nodes)
        job = int(variables.get("SLURM_JOB_ID", 0)) + int(variables.get("SLURM_STEP_ID", 0))
        meeting = f"tcp://{host}:{variables.get('MASTER_PORT', PORTS[job % len(PORTS)])}"
    else:
        return None
    return (rank, world, meeting) if world > 1 else None


def rank() -> int:
    """Which of a launcher's processes this is; 0 without a launcher."""
    found = launcher()
    return 0 if found is None else found[0]


def first_host(nodes: str) -> str:
    """The first host of a SLURM node list.

    Example:
        >>> first_host("gpu[007-010,012],login1"), first_host("a,b")
        ('gpu007', 'a')
    """
    match = re.match(r"([^\[,]+)(?:\[(\d+)[^\]]*\]([^,]*))?", nodes)
    if match is None:
        raise ValueError(
            f"No host can be read from the SLURM node list {nodes!r}; set MASTER_ADDR."
        )
    return "".join(part or "" for part in match.groups())


def local_rank() -> int | None:
    """Which of a launcher's processes on this host this is; None without a launcher."""
    if "LOCAL_RANK" in os.environ:
        return int(os.environ["LOCAL_RANK"])
    # In a batch script, which is no step, it says nothing.
    return int(os.environ.get("SLURM_LOCALID", 0)) if "SLURM_STEP_NUM_TASKS" in os.environ else None

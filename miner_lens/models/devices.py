"""Which device is this process's."""

from __future__ import annotations

import os

import torch


def default_device() -> torch.device:
    """The accelerator of this process, or the CPU; processes of a host go around its devices."""
    # A CUDA build of torch names CUDA as its accelerator on machines that have none.
    available = torch.accelerator.is_available()
    accelerator = torch.accelerator.current_accelerator() if available else None
    if accelerator is None:
        return torch.device("cpu")
    rank = local_rank()
    if rank is None:
        return accelerator
    return torch.device(accelerator.type, rank % torch.accelerator.device_count())


def local_rank() -> int | None:
    """Which of a launcher's processes on this host this is; None without a launcher."""
    if "LOCAL_RANK" in os.environ:
        return int(os.environ["LOCAL_RANK"])
    # In a batch script, which is no step, it says nothing.
    return int(os.environ.get("SLURM_LOCALID", 0)) if "SLURM_STEP_NUM_TASKS" in os.environ else None

"""Which device is this process's."""

from __future__ import annotations

import torch

from miner_lens.launchers import local_rank


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

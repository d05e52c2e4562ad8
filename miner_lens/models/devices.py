"""Which device is this process's, and which weights are on none."""

from __future__ import annotations

from typing import Any

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


def offloaded_weights(hf_model: Any) -> set[int]:
    """The `id` of each weight that accelerate brings when its layer computes."""
    found: set[int] = set()
    for module in hf_model.modules():
        hook = getattr(module, "_hf_hook", None)
        if any(getattr(one, "offload", False) for one in getattr(hook, "hooks", [hook])):
            found.update(map(id, module.parameters()))
    return found

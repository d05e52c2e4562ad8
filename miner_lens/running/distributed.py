"""Several processes that share one run, over torch.distributed.

The launcher notices a rank that dies and ends the others; without one, torch.distributed does when
its connection closes or its time-out has passed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from itertools import count
from typing import Any

import torch
from safetensors.torch import load, save
from torch import distributed

from miner_lens.launchers import launcher
from miner_lens.running.stateful import Mergeable

TIMEOUT = timedelta(hours=6)  # how long ranks that are done wait for the others
ADVICE = "Start it again; with checkpoint='folder' it continues, with any number of processes."

_c10d: Any = distributed  # some of its names are not typed
_runs = count()  # every rank counts alike, so each run has keys of its own


class RankError(RuntimeError):
    """Another process of this run has stopped, so it cannot finish."""


@dataclass(frozen=True)
class Ranks:
    """The processes of one run, and which of them this is.

    Where another rank has stopped, its methods raise `RankError`.
    """

    rank: int = 0
    world_size: int = 1
    group: Any = None  # of gloo

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, which JSON can hold, on every rank."""
        data = json.dumps(value).encode()
        return [json.loads(self._broadcast(data, rank)) for rank in range(self.world_size)]

    def merge(self, state: Mergeable) -> None:
        """Give every rank the sum of all ranks' states, added up in the same order."""
        if self.world_size == 1:
            return
        own = save(state.state_dict())
        for rank in range(self.world_size):
            theirs = load(self._broadcast(own, rank))
            (state.merge_state_dict if rank else state.load_state_dict)(theirs)

    def _broadcast(self, data: bytes, source: int) -> bytes:
        """What the source has, on every rank; the length goes first."""
        if self.world_size == 1:
            return data
        length, content = torch.tensor([len(data)]), bytearray(data)
        try:
            distributed.broadcast(length, source, group=self.group)
            if self.rank != source:
                content = bytearray(int(length))
            distributed.broadcast(torch.frombuffer(content, dtype=torch.uint8), source, self.group)
        except RuntimeError as error:
            text = f"Another rank of {self.world_size} has stopped; its output says why."
            raise RankError(text) from error
        return bytes(content)


@contextmanager
def joined() -> Iterator[Ranks]:
    """The processes that this run is shared by, for as long as it lasts.

    They are those of an initialised process group, or those that the launcher's environment tells
    of (`RANK` and `WORLD_SIZE`, or a SLURM step); otherwise this process is alone. A group made
    here is destroyed here. Errors say which rank it was, and how to go on.
    """
    group, found = None, launcher()
    if distributed.is_available() and distributed.is_initialized():
        group = distributed.new_group(backend="gloo", timeout=TIMEOUT)
    elif found is not None:
        rank, world_size, _ = found
        store = _c10d.PrefixStore(f"miner_lens/{next(_runs)}", _store(*found))
        distributed.init_process_group(
            "gloo", store=store, rank=rank, world_size=world_size, timeout=TIMEOUT
        )
    else:
        yield Ranks()
        return
    ranks = Ranks(distributed.get_rank(), distributed.get_world_size(), group)
    try:
        yield ranks
    except Exception as error:
        error.add_note(f"Rank {ranks.rank} of {ranks.world_size} stopped here. {ADVICE}")
        raise
    finally:
        distributed.destroy_process_group(group)


@cache
def _store(rank: int, world_size: int, meeting: str) -> Any:
    """Kept for the life of the process: a second run could not bind the port again at once."""
    return next(iter(_c10d.rendezvous(meeting, rank, world_size)))[0]

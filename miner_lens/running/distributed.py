"""Several processes that share one run, over torch.distributed.

The launcher notices a rank that dies and ends the others; without one, torch.distributed does when
its connection closes or its time-out has passed.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import cache, partial
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import distributed

from miner_lens.launchers import launcher
from miner_lens.running.stateful import Mergeable, State, apart, together

TIMEOUT = timedelta(hours=6)  # how long ranks that are done wait for the others

_c10d: Any = distributed  # some of its names are not typed
_runs = 0


class RankError(RuntimeError):
    """Another process of this run has stopped, so it cannot finish."""


@dataclass
class Ranks:
    """The processes of one run, and which of them this is.

    Where another rank has stopped, its methods raise `RankError`.
    """

    rank: int = 0
    world_size: int = 1
    store: Any = None  # for keys of this run alone
    group: Any = None  # of gloo
    advice: str = ""  # what an error says last
    _told: tuple[int, int] = (0, 0)

    def progress(self, items: int, skipped: int) -> tuple[int, int]:
        """Tell how far this rank is; how far all are."""
        if self.store is None:
            return items, skipped
        with self._reaching():
            all_items = self.store.add("items", items - self._told[0])
            all_skipped = self.store.add("skipped", skipped - self._told[1])
        self._told = items, skipped
        return all_items, all_skipped

    def wait(self, meanwhile: Callable[[], object] = lambda: None) -> None:
        """Until all ranks are here; meanwhile, `meanwhile` is called."""
        if self.store is None:
            return
        with self._reaching():
            arrived = distributed.barrier(group=self.group, async_op=True)
            while not arrived.is_completed():
                meanwhile()
                time.sleep(0.1)
            arrived.wait()  # raises what went wrong

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, which JSON can hold, on every rank."""
        data = json.dumps(value).encode()
        return [json.loads(self._broadcast(data, rank)) for rank in range(self.world_size)]

    def merge(self, states: Sequence[Mergeable]) -> None:
        """Merge all ranks' states on rank 0, one rank after the other, and give the sum to all."""
        if self.store is None:
            return
        for rank in range(1, self.world_size):
            if self.rank == rank:
                self._move(partial(distributed.send, dst=0), _packed(states))
            if self.rank == 0:
                theirs = self._move(partial(distributed.recv, src=rank))
                for own, state in zip(states, _unpacked(theirs, len(states)), strict=True):
                    own.merge_state_dict(state)
        total = self._broadcast(_packed(states) if self.rank == 0 else b"", 0)
        for own, state in zip(states, _unpacked(total, len(states)), strict=True):
            own.load_state_dict(state)
        self.wait()  # nobody hangs up before all has arrived

    def _broadcast(self, data: bytes, source: int) -> bytes:
        """What the source has, on every rank."""
        if self.store is None:
            return data
        own = data if self.rank == source else None
        return self._move(partial(distributed.broadcast, src=source), own)

    def _move(self, move: Callable[..., object], data: bytes | None = None) -> bytes:
        """Send data, where there is some, or receive them; the length goes first."""
        length = torch.tensor([0 if data is None else len(data)])
        with self._reaching():
            move(length, group=self.group)
            if data is None:
                content = torch.empty(int(length), dtype=torch.uint8)
            else:
                content = torch.frombuffer(bytearray(data), dtype=torch.uint8)
            move(content, group=self.group)
        return content.numpy().tobytes()

    @contextmanager
    def _reaching(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            text = "has stopped; its output, or the launcher's, says why."
            raise RankError(f"Another rank of {self.world_size} {text} {self.advice}") from error


def _packed(states: Sequence[Mergeable]) -> bytes:
    packed: bytes = safetensors.torch.save(together(states))
    return packed


def _unpacked(data: bytes, count: int) -> list[State]:
    return apart(safetensors.torch.load(data), count)


@contextmanager
def joined(checkpoint: str | Path | None) -> Iterator[Ranks]:
    """The processes that this run is shared by, for as long as it lasts.

    They are those of an initialised process group, or those that the launcher's environment tells
    of (`RANK` and `WORLD_SIZE`, or a SLURM step); otherwise this process is alone. A group made
    here is destroyed here. Errors say how to go on from the checkpoint.
    """
    theirs = distributed.is_available() and distributed.is_initialized()
    if theirs:
        rank, world_size = distributed.get_rank(), distributed.get_world_size()
        base = _c10d.distributed_c10d._get_default_store()
    else:
        rank, world_size, *where = launcher() or (0, 1)
        base = _store(rank, world_size, *where) if where else None
    if world_size == 1:
        yield Ranks()
        return
    global _runs
    _runs += 1  # every rank counts alike, so each run has keys of its own
    store = _c10d.PrefixStore(f"miner_lens/{_runs}", base)
    group = distributed.new_group(backend="gloo", timeout=TIMEOUT) if theirs else None
    if not theirs:
        distributed.init_process_group(
            "gloo", store=store, rank=rank, world_size=world_size, timeout=TIMEOUT
        )
    advice = "Nothing was kept: with checkpoint='folder' the next run would continue."
    if checkpoint is not None:
        advice = f"Start it again to continue from {checkpoint}, with any number of processes."
    try:
        yield Ranks(rank, world_size, store, group, advice)
    except Exception as error:
        if not isinstance(error, RankError):
            error.add_note(f"Rank {rank} of {world_size} stopped here. {advice}")
        raise
    finally:
        distributed.destroy_process_group(group)


@cache
def _store(rank: int, world_size: int, host: str, port: int) -> Any:
    """Kept for the life of the process: a second run could not bind the port again at once."""
    url = f"tcp://{host}:{port}?rank={rank}&world_size={world_size}"
    return next(iter(_c10d.rendezvous(url)))[0]

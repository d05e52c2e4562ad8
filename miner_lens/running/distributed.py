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
from functools import cache
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, distributed

from miner_lens.launchers import launcher
from miner_lens.running.stateful import State

TIMEOUT = timedelta(hours=6)  # how long ranks that are done wait for the others
INTERVAL = 1.0  # seconds between two reports of progress

_c10d: Any = distributed  # some of its names are not typed
_runs = 0


class RankError(RuntimeError):
    """Another process of this run has stopped, so it cannot finish."""


@dataclass
class Ranks:
    """The processes of one run, and which of them this is."""

    rank: int = 0
    world_size: int = 1
    store: Any = None  # for keys of this run alone
    group: Any = None  # of gloo
    advice: str = ""  # what an error says last
    _told: float = -float("inf")
    _own: tuple[int, int] = (0, 0)
    _all: tuple[int, int] = (0, 0)

    def progress(self, items: int, skipped: int) -> tuple[int, int]:
        """Tell how far this rank is; how far all are, as far as is known."""
        if self.store is None:
            return items, skipped
        if time.monotonic() - self._told > INTERVAL:
            with self._reaching():
                self._all = (
                    self.store.add("items", items - self._own[0]),
                    self.store.add("skipped", skipped - self._own[1]),
                )
            self._own, self._told = (items, skipped), time.monotonic()
        return self._all

    def gather(self, value: Any, meanwhile: Callable[[], object] = lambda: None) -> list[Any]:
        """Every rank's value, which JSON can hold, on every rank; meanwhile, `meanwhile` is called.

        Raises:
            RankError: Another rank has stopped.
        """
        if self.store is None:
            return [value]
        data = _bytes(json.dumps(value).encode())
        lengths = [int(one) for one in self._all_gather(torch.tensor([len(data)]), meanwhile)]
        padded = torch.cat([data, data.new_zeros(max(lengths) - len(data))])
        pairs = zip(self._all_gather(padded, meanwhile), lengths, strict=True)
        return [json.loads(one[:length].numpy().tobytes()) for one, length in pairs]

    def states(self, analyzers: Sequence[Any]) -> Iterator[list[State]]:
        """On rank 0 each other rank's states, one for each analyzer; others send theirs."""
        own = [_bytes(safetensors.torch.save(a.state_dict())) for a in analyzers if self.rank]
        for rank, lengths in enumerate(self.gather([len(one) for one in own])):
            theirs = [torch.empty(one, dtype=torch.uint8) for one in lengths]
            with self._reaching():
                for data in own if self.rank == rank else ():
                    distributed.send(data, 0, group=self.group)
                for data in theirs if self.rank == 0 else ():
                    distributed.recv(data, rank, group=self.group)
            if self.rank == 0 < rank:
                yield [safetensors.torch.load(data.numpy().tobytes()) for data in theirs]

    def share(self, analyzers: Sequence[Any]) -> None:
        """Give rank 0's states to all."""
        if self.store is None:
            return
        for analyzer in analyzers:
            data = _bytes(safetensors.torch.save(analyzer.state_dict() if self.rank == 0 else {}))
            length = self.gather(len(data))[0]
            data = data if self.rank == 0 else torch.empty(length, dtype=torch.uint8)
            with self._reaching():
                distributed.broadcast(data, 0, group=self.group)
            analyzer.load_state_dict(safetensors.torch.load(data.numpy().tobytes()))
        self.gather(None)  # nobody hangs up before all has arrived

    def _all_gather(self, tensor: Tensor, meanwhile: Callable[[], object]) -> list[Tensor]:
        found = [torch.empty_like(tensor) for _ in range(self.world_size)]
        with self._reaching():
            work = distributed.all_gather(found, tensor, group=self.group, async_op=True)
            while not work.is_completed():
                meanwhile()
                time.sleep(0.01)
            work.wait()  # raises what went wrong
        return found

    @contextmanager
    def _reaching(self) -> Iterator[None]:
        try:
            yield
        except RankError:
            raise
        except RuntimeError as error:
            text = "has stopped; its output, or the launcher's, says why."
            raise RankError(f"Another rank of {self.world_size} {text} {self.advice}") from error


def _bytes(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


@contextmanager
def joined(advice: str) -> Iterator[Ranks]:
    """The processes that this run is shared by, for as long as it lasts.

    They are those of an initialised process group, or those that the launcher's environment tells
    of (`RANK` and `WORLD_SIZE`, or a SLURM step); otherwise this process is alone. A group made
    here is destroyed here. Errors end with the advice.
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

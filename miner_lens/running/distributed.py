"""Several processes that share one run, over torch.distributed.

The launcher (torchrun, accelerate, srun) notices a rank that dies and ends the others; without one,
torch.distributed's time-outs do. Small things that ranks tell each other are JSON in the key-value
store at which they meet; states are safetensors, sent over gloo.
"""

from __future__ import annotations

import json
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import cache
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, distributed

from miner_lens.running.launchers import launcher

TIMEOUT = timedelta(minutes=30)  # torch.distributed's own; how long ranks wait for each other
INTERVAL = 1.0  # seconds between two reports of progress
PIECE = 1 << 28  # bytes in one send

_c10d: Any = distributed  # some of its names are not typed
_runs = 0


class RankError(RuntimeError):
    """Another process of this run has stopped, so it cannot finish."""


class Ranks:
    """The processes of one run; this class is a single process by itself."""

    rank = 0
    world_size = 1

    def progress(self, samples: int, skipped: int) -> tuple[int, int]:
        """Tell how far this rank is; how far all are, as far as is known.

        Raises:
            RankError: Another rank has stopped.
        """
        return samples, skipped

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value, which JSON can hold."""
        return value

    def gather(self, value: Any, meanwhile: Callable[[], object] | None = None) -> list[Any]:
        """Every rank's value, which JSON can hold, on every rank.

        Args:
            value: This rank's.
            meanwhile: Called now and then while waiting for the others.
        """
        return [value]

    def states(self, analyzers: Sequence[Any], seen: bool) -> Iterator[list[dict[str, Tensor]]]:
        """On rank 0 the states of each other rank that has seen anything; others send theirs."""
        return iter(())


class ManyRanks(Ranks):
    """One of several processes.

    Args:
        store: A key-value store of this run alone.
        rank: Which process this is.
        world_size: How many there are.
        group: The gloo group that states are sent in.
        advice: What an error says last, such as how to continue.
    """

    def __init__(self, store: Any, rank: int, world_size: int, group: Any, advice: str) -> None:
        self.rank, self.world_size, self.advice = rank, world_size, advice
        self.terminated = False
        self._store, self._group = store, group
        self._calls, self._told = 0, -float("inf")
        self._own = self._totals = (0, 0)

    def progress(self, samples: int, skipped: int) -> tuple[int, int]:
        """Tell how far this rank is; how far all are, as far as is known."""
        self._look()
        if time.monotonic() - self._told > INTERVAL:
            with self._reaching():
                self._totals = (
                    self._store.add("samples", samples - self._own[0]),
                    self._store.add("skipped", skipped - self._own[1]),
                )
            self._own, self._told = (samples, skipped), time.monotonic()
        return self._totals

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value, which JSON can hold."""
        return self._exchange(value if self.rank == 0 else None, [0], None)[0]

    def gather(self, value: Any, meanwhile: Callable[[], object] | None = None) -> list[Any]:
        """Every rank's value, which JSON can hold, on every rank."""
        return self._exchange(value, range(self.world_size), meanwhile)

    def states(self, analyzers: Sequence[Any], seen: bool) -> Iterator[list[dict[str, Tensor]]]:
        """On rank 0 the states of each other rank that has seen anything; others send theirs."""
        own = [safetensors.torch.save(a.state_dict()) for a in analyzers if seen and self.rank]
        sizes = self.gather([len(one) for one in own])
        for rank, lengths in enumerate(sizes):
            theirs = []
            for number, length in enumerate(lengths):
                if self.rank not in (0, rank):
                    continue
                data = torch.frombuffer(bytearray(own[number] if own else length), dtype=torch.uint8)
                try:
                    for piece in data.split(PIECE):
                        if self.rank:
                            distributed.send(piece, 0, group=self._group)
                        else:
                            distributed.recv(piece, rank, group=self._group)
                except RuntimeError as error:
                    text = f"Rank {rank} of {self.world_size} has stopped while states were merged."
                    raise RankError(f"{text} {self.advice}") from error
                theirs.append(data)
            if self.rank == 0 and theirs:
                yield [safetensors.torch.load(data.numpy().tobytes()) for data in theirs]
        self.gather(None)  # nobody hangs up before all has arrived

    def fail(self, error: BaseException) -> None:
        """Tell the others why this rank stops, unless it is because another has."""
        if not isinstance(error, RankError) or self.terminated:
            what = "was told to stop (SIGTERM)." if self.terminated else "has stopped: "
            text = what if self.terminated else f"{what}{type(error).__name__}: {error}"
            with suppress(RuntimeError):
                if not self._store.check(["failed"]):
                    self._store.set("failed", json.dumps([self.rank, text]))

    def leave(self) -> None:
        """Rank 0 may host the store, so it goes last; but it waits for a moment only."""
        with suppress(RuntimeError):
            self._store.set(f"left/{self.rank}", "")
            keys = [f"left/{rank}" for rank in range(self.world_size)]
            patience = time.monotonic() + min(5.0, TIMEOUT.total_seconds())
            while self.rank == 0 and time.monotonic() < patience and not self._store.check(keys):
                time.sleep(0.02)

    def _exchange(
        self, value: Any, ranks: Sequence[int], meanwhile: Callable[[], object] | None
    ) -> list[Any]:
        self._calls += 1
        keys = [f"{self._calls}/{rank}" for rank in ranks]
        totals, since = self._totals, time.monotonic()
        with self._reaching():
            if self.rank in ranks:
                self._store.set(f"{self._calls}/{self.rank}", json.dumps(value))
            while not self._store.check(keys):
                self._look()
                if meanwhile is not None:
                    meanwhile()
                if totals != self._totals:  # somebody is still at work
                    totals, since = self._totals, time.monotonic()
                if time.monotonic() - since > TIMEOUT.total_seconds():
                    silent = [r for r, key in zip(ranks, keys, strict=True) if not self._has(key)]
                    raise RankError(
                        f"Rank {', '.join(map(str, silent))} of {self.world_size} has not answered "
                        f"for {TIMEOUT}: it was killed, or its host is gone. {self.advice}"
                    )
                time.sleep(0.02)
            return [json.loads(self._store.get(key)) for key in keys]

    def _has(self, key: str) -> bool:
        found: bool = self._store.check([key])
        return found

    def _look(self) -> None:
        """Raise `RankError` if another rank has told that it stops, or this one is told to."""
        if self.terminated:
            raise RankError(
                f"Rank {self.rank} of {self.world_size} was told to stop (SIGTERM), as launchers "
                "do when another rank has died; the launcher's report names it. " + self.advice
            )
        with self._reaching():
            failed = json.loads(self._store.get("failed")) if self._has("failed") else None
        if failed is not None:
            raise RankError(f"Rank {failed[0]} of {self.world_size} {failed[1]} {self.advice}")

    @contextmanager
    def _reaching(self) -> Iterator[None]:
        try:
            yield
        except RankError:
            raise
        except RuntimeError as error:
            raise RankError(
                f"Rank {self.rank} of {self.world_size} cannot reach the others: rank 0, or the "
                f"launcher on its host, has stopped. {self.advice}"
            ) from error


@contextmanager
def joined(advice: str) -> Iterator[Ranks]:
    """The processes that this run is shared by, for as long as it lasts.

    They are those of an initialised process group, or those that the launcher's environment tells
    of (`RANK` and `WORLD_SIZE`, or a SLURM step); otherwise this process is alone. A group made
    here is destroyed here.

    Args:
        advice: What errors say last, such as how to continue.
    """
    met = _meet()
    if met is None:
        yield Ranks()
        return
    global _runs
    _runs += 1  # every rank counts alike, so each run has keys of its own
    base, rank, world_size = met
    store: Any = _c10d.PrefixStore(f"miner_lens/{_runs}", base)
    group = None
    if not distributed.is_initialized():
        distributed.init_process_group(
            "gloo", store=store, rank=rank, world_size=world_size, timeout=TIMEOUT
        )
    else:
        group = distributed.new_group(backend="gloo", timeout=TIMEOUT)
    ranks = ManyRanks(store, rank, world_size, group, advice)
    try:
        with _noticing_sigterm(ranks):
            yield ranks
    except BaseException as error:
        ranks.fail(error)
        if not isinstance(error, RankError):
            error.add_note(f"Rank {rank} of {world_size} stopped here. {advice}")
        raise
    finally:
        ranks.leave()
        distributed.destroy_process_group(group)


@contextmanager
def _noticing_sigterm(ranks: ManyRanks) -> Iterator[None]:
    """Launchers end the ranks that are left by SIGTERM: finish the pass, write, and say so."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def note(number: int, frame: Any) -> None:
        ranks.terminated = True

    former = signal.signal(signal.SIGTERM, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, former)
    if ranks.terminated:  # too late to stop the run, but not to stop
        signal.raise_signal(signal.SIGTERM)


def _meet() -> tuple[Any, int, int] | None:
    """A store that all processes share, this one's rank, and their number."""
    if distributed.is_available() and distributed.is_initialized():
        world_size = distributed.get_world_size()
        if world_size == 1:
            return None
        return _c10d.distributed_c10d._get_default_store(), distributed.get_rank(), world_size
    launched = launcher()
    if launched is None:
        return None
    rank, world_size, host, port = launched
    return _store(rank, world_size, host, port), rank, world_size


@cache
def _store(rank: int, world_size: int, host: str, port: int) -> Any:
    """Kept for the life of the process: a second run could not bind the port again at once."""
    url = f"tcp://{host}:{port}?rank={rank}&world_size={world_size}"
    try:
        store, _, _ = next(iter(_c10d.rendezvous(url, timeout=TIMEOUT)))
    except distributed.DistError as error:
        raise RankError(
            f"Rank {rank} of {world_size} could not meet the others at {host}:{port} within "
            f"{TIMEOUT}: {error}"
        ) from error
    return store

"""Several processes that share one run: who they are, whether they live, and their states.

Messages go through the key-value store that `torch.distributed` meets at, because its calls return
at once and so can be mixed with looking whether the others are alive. Only the analyzers' states
travel by point-to-point sends, over gloo on the CPU.
"""

from __future__ import annotations

import copy
import json
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import cache
from typing import Any

import torch
from torch import Tensor, distributed

from miner_lens.running.launchers import launcher

BEAT = 2.0  # seconds between two signs of life
SILENCE = 60.0  # seconds without one after which a rank counts as dead
PAUSE = 0.02  # seconds between two looks at the store while waiting
MEETING = timedelta(minutes=10)  # how long ranks wait for each other at the start
SENDING = timedelta(minutes=10)  # and for a piece of a state
PIECE = 1 << 28  # bytes in one send

_c10d: Any = distributed  # some of its names are not typed
_runs = 0


class RankError(RuntimeError):
    """Another process of this run has stopped, so it cannot finish."""


class Ranks:
    """The processes of one run; this class is a single process by itself.

    Attributes:
        rank: Which one this is.
        world: How many there are.
    """

    rank = 0
    world = 1

    def progress(self, samples: int, skipped: int) -> tuple[int, int]:
        """Tell how far this rank is; how far all are, as far as is known.

        Raises:
            RankError: Another rank has stopped.
        """
        return samples, skipped

    def share(self, value: Any) -> Any:
        """Rank 0's value, which JSON can hold."""
        return value

    def gather(self, value: Any, meanwhile: Callable[[], object] | None = None) -> list[Any]:
        """Every rank's value, which JSON can hold, on every rank.

        Args:
            value: This rank's.
            meanwhile: Called now and then while waiting for the others.
        """
        return [value]

    def merge(self, analyzers: Sequence[Any], model: Any, seen: bool) -> None:
        """Give rank 0's analyzers what all have seen.

        Args:
            analyzers: This rank's.
            model: The model that they have read; it is not copied.
            seen: Whether they have seen anything.
        """


class ManyRanks(Ranks):
    """One of several processes.

    Args:
        store: A key-value store of this run alone.
        rank: Which process this is.
        world: How many there are.
        group: The gloo group that states are sent in.
        advice: What an error says last, such as how to continue.
    """

    def __init__(self, store: Any, rank: int, world: int, group: Any, advice: str) -> None:
        self.rank = rank
        self.world = world
        self.terminated = False
        self._store = store
        self._group = group
        self._advice = advice
        self._calls = 0
        self._looked = self._heard = time.monotonic()
        self._beats = -1
        self._told = -float("inf")
        self._own = self._totals = (0, 0)
        self._leaving = threading.Event()
        self._heart = threading.Thread(target=self._beat, daemon=True)
        self._heart.start()

    def _beat(self) -> None:
        while not self._leaving.wait(BEAT):
            try:
                self._store.add(f"beat/{self.rank}", 1)
            except RuntimeError:  # the store is gone; whoever looks next says so
                return

    def progress(self, samples: int, skipped: int) -> tuple[int, int]:
        """Tell how far this rank is; how far all are, as far as is known."""
        now = time.monotonic()
        if now - self._told > BEAT / 2:
            self._told = now
            with suppress(RuntimeError):  # `_look` says what is wrong
                self._totals = (
                    self._store.add("samples", samples - self._own[0]),
                    self._store.add("skipped", skipped - self._own[1]),
                )
                self._own = (samples, skipped)
        self._look()
        return self._totals

    def _look(self) -> None:
        """Raise `RankError` if another rank has stopped."""
        if self.terminated:
            self._fail(self.rank, "was told to stop (SIGTERM).")
            raise RankError(
                f"Rank {self.rank} of {self.world} was told to stop (SIGTERM), as launchers do "
                f"when another rank has died; the launcher's report names it. {self._advice}"
            )
        now = time.monotonic()
        if now - self._looked < BEAT / 2:
            return
        self._looked = now
        try:
            failed = self._store.check(["failed"])
            reason = json.loads(self._store.get("failed")) if failed else None
            beats = self._store.add(f"beat/{self._neighbour}", 0)
        except RuntimeError as error:
            raise RankError(
                f"Rank {self.rank} of {self.world} cannot reach the others: rank 0, or the "
                f"launcher on its host, has stopped. {self._advice}"
            ) from error
        if reason is not None:
            raise RankError(f"Rank {reason[0]} of {self.world} {reason[1]} {self._advice}")
        if beats != self._beats:
            self._beats, self._heard = beats, now
        elif now - self._heard > SILENCE:
            self._fail(self._neighbour, f"has given no sign of life for {SILENCE:.0f} s.")
            raise RankError(
                f"Rank {self._neighbour} of {self.world} has given no sign of life for "
                f"{SILENCE:.0f} s: it was killed, or its host is gone. {self._advice}"
            )

    @property
    def _neighbour(self) -> int:
        """Each rank listens to one other."""
        return (self.rank - 1) % self.world

    def _fail(self, rank: int, reason: str) -> None:
        """Tell the others, unless something that may be the cause of this was told before."""
        with suppress(RuntimeError):
            if not self._store.check(["failed"]):
                self._store.set("failed", json.dumps([rank, reason]))

    def _wait(self, keys: list[str], meanwhile: Callable[[], object] | None = None) -> None:
        while True:
            try:
                if self._store.check(keys):
                    return
            except RuntimeError:
                self._looked = -float("inf")  # look at once what is wrong
            self._look()
            if meanwhile is not None:
                meanwhile()
            time.sleep(PAUSE)

    def share(self, value: Any) -> Any:
        """Rank 0's value, which JSON can hold."""
        self._calls += 1
        key = f"share/{self._calls}"
        if self.rank == 0:
            self._store.set(key, json.dumps(value))
        self._wait([key])
        return json.loads(self._store.get(key))

    def gather(self, value: Any, meanwhile: Callable[[], object] | None = None) -> list[Any]:
        """Every rank's value, which JSON can hold, on every rank."""
        self._calls += 1
        keys = [f"gather/{self._calls}/{rank}" for rank in range(self.world)]
        self._store.set(keys[self.rank], json.dumps(value))
        self._wait(keys, meanwhile)
        return [json.loads(self._store.get(key)) for key in keys]

    def merge(self, analyzers: Sequence[Any], model: Any, seen: bool) -> None:
        """Give rank 0's analyzers what all have seen, in as many rounds as doublings of ranks."""
        step = 1
        while step < self.world:
            if self.rank % (2 * step):
                self._send(self.rank - step, analyzers, seen)
                break
            if self.rank + step < self.world:
                theirs = list(self._receive(self.rank + step, len(analyzers)))
                for analyzer, state in zip(analyzers, theirs, strict=True):
                    if state is not None:
                        absorb(analyzer, state, model, seen)
                seen = seen or any(state is not None for state in theirs)
            step *= 2
        self.gather(None)  # nobody hangs up before all has arrived

    def _send(self, rank: int, analyzers: Sequence[Any], seen: bool) -> None:
        for analyzer in analyzers:
            state = analyzer.state() if seen else None
            described = state and [
                [name, str(t.dtype).removeprefix("torch."), list(t.shape)]
                for name, t in state.items()
            ]
            text = torch.frombuffer(bytearray(json.dumps(described).encode()), dtype=torch.uint8)
            self._transfer(distributed.send, torch.tensor([len(text)]), rank)
            self._transfer(distributed.send, text, rank)
            for tensor in (state or {}).values():
                self._transfer(distributed.send, as_bytes(tensor), rank)

    def _receive(self, rank: int, states: int) -> Iterator[dict[str, Tensor] | None]:
        for _ in range(states):
            size = torch.zeros(1, dtype=torch.long)
            self._transfer(distributed.recv, size, rank)
            text = torch.empty(int(size), dtype=torch.uint8)
            self._transfer(distributed.recv, text, rank)
            described = json.loads(bytes(text.numpy()))
            if described is None:
                yield None
                continue
            state = {}
            for name, dtype, shape in described:
                tensor = torch.empty(shape, dtype=getattr(torch, dtype))
                self._transfer(distributed.recv, as_bytes(tensor), rank)
                state[name] = tensor
            yield state

    def _transfer(self, function: Any, data: Tensor, rank: int) -> None:
        try:
            for start in range(0, len(data), PIECE):
                function(data[start : start + PIECE], rank, group=self._group)
        except RuntimeError as error:
            self._fail(rank, "has stopped while states were merged.")
            raise RankError(
                f"Rank {rank} of {self.world} has stopped while states were merged. {self._advice}"
            ) from error

    def leave(self, error: BaseException | None) -> None:
        """Stop beating, and say why if this rank fails. Rank 0 may host the store and goes last."""
        if error is not None and not isinstance(error, RankError):
            self._fail(self.rank, f"has stopped: {type(error).__name__}: {error}")
        keys = [f"left/{rank}" for rank in range(self.world)]
        with suppress(RuntimeError):
            self._store.set(keys[self.rank], "")
            if self.rank == 0:
                patience = time.monotonic() + (2 * BEAT if error else SILENCE)
                while time.monotonic() < patience and not self._store.check(keys):
                    time.sleep(PAUSE)
        self._leaving.set()
        self._heart.join()


def absorb(analyzer: Any, state: dict[str, Tensor], model: Any, seen: bool = True) -> None:
    """Add another analyzer's state to an analyzer, in place.

    Args:
        analyzer: What adds it.
        state: What the other analyzer's `state` gave.
        model: The model that both have read; it is not copied.
        seen: Whether the analyzer has seen anything itself.
    """
    if not seen:
        analyzer.restore(state)
        return
    shared = (model, getattr(model, "original_model", None))
    other = copy.deepcopy(analyzer, {id(one): one for one in shared})
    other.restore(state)
    analyzer.restore(analyzer.merge(other).state())


def as_bytes(tensor: Tensor) -> Tensor:
    """A tensor's memory, flat; gloo does not know every dtype."""
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8)


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
    base, rank, world = met
    store: Any = _c10d.PrefixStore(f"miner_lens/{_runs}", base)
    made = not distributed.is_initialized()
    group = None
    if made:
        distributed.init_process_group(
            "gloo", store=store, rank=rank, world_size=world, timeout=SENDING
        )
    else:
        group = distributed.new_group(backend="gloo", timeout=SENDING)
    ranks = ManyRanks(store, rank, world, group, advice)
    error: BaseException | None = None
    try:
        with _noticing_sigterm(ranks):
            yield ranks
    except BaseException as caught:
        error = caught
        if not isinstance(caught, RankError):
            caught.add_note(f"Rank {rank} of {world} stopped here. {advice}")
        raise
    finally:
        ranks.leave(error)
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
        world = distributed.get_world_size()
        if world == 1:
            return None
        return _c10d.distributed_c10d._get_default_store(), distributed.get_rank(), world
    launched = launcher()
    if launched is None:
        return None
    rank, world, host, port = launched
    return _store(rank, world, host, port), rank, world


@cache
def _store(rank: int, world: int, host: str, port: int) -> Any:
    """Kept for the life of the process: a second run could not bind the port again at once."""
    url = f"tcp://{host}:{port}?rank={rank}&world_size={world}"
    try:
        store, _, _ = next(iter(_c10d.rendezvous(url, timeout=MEETING)))
    except distributed.DistError as error:
        raise RankError(
            f"Rank {rank} of {world} could not meet the others at {host}:{port} within "
            f"{MEETING}: {error}"
        ) from error
    return store

"""Let a run continue where it was stopped.

Each process keeps one file, replaced whole, with its analyzers' states and the items that they have
seen. What is done is what the files say together, whoever has written them. A file that is damaged
says nothing, so its items are done again.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from miner_lens import files
from miner_lens.data.signature import signature
from miner_lens.running.distributed import Ranks
from miner_lens.running.stateful import Mergeable, State, apart, together

KIND = "run"
LOCK = ".lock"
NAME = "rank-{rank}-of-{world_size}.safetensors"

Done = dict[int, int]  # the signature of each item, by its number in the data


@dataclass
class Record:
    """What a process has done.

    Attributes:
        done: The items of which the analyzers have seen all that can be used, where it is kept.
        seen: How many they are.
        skipped: How many of them could not be used.
        limit: The most tokens in a pass, where batches are made by length.
    """

    done: Done = field(default_factory=dict)
    seen: int = 0
    skipped: int = 0
    limit: int | None = None

    def add(self, unit: dict[int, Any], skipped: int, kept: bool = True) -> None:
        """Count the items of a unit."""
        if kept:
            self.done |= {number: signature(item) for number, item in unit.items()}
        self.seen += len(unit)
        self.skipped += skipped


@dataclass
class Checkpoint:
    """The files of a run in a folder that all its processes share.

    A process writes after so many seconds (0: after each unit) or samples. The settings, which JSON
    can hold, must be the same for a run to be continued.
    """

    folder: Path
    ranks: Ranks
    settings: dict[str, Any]
    seconds: float
    samples: int | None = None
    _replaced: list[str] = field(default_factory=list)
    _time: float = field(default_factory=time.monotonic)  # of the last write
    _items: int = 0  # in it

    @property
    def name(self) -> str:
        """What this process's file is called."""
        return NAME.format(rank=self.ranks.rank, world_size=self.ranks.world_size)

    @contextmanager
    def reserved(self) -> Iterator[None]:
        """Keep the folder from other runs; rank 0 does this for all. A killed process lets go.

        Raises:
            ValueError: Another run is using it.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(self.folder / LOCK, timeout=0):
                yield
        except Timeout as error:
            raise ValueError(
                f"Another run is using {self.folder}. Wait for it, or give another folder. (If "
                f"there is none, its host may have died: remove {self.folder / LOCK}.)"
            ) from error

    def survey(self) -> dict[str, Done]:
        """What the intact files cover, by their names. Rank 0 does this for all.

        A file that shares items with a larger one is left out, and removed where it has no others:
        it was merged into that one, or a process went on writing after its run was over.

        Raises:
            ValueError: The files are of a run with other settings.
        """
        for half in self.folder.glob(".rank-*.safetensors.*"):  # of a write that was cut off
            half.unlink(missing_ok=True)
        covered: dict[str, Done] = {}
        for path in sorted(self.folder.glob(NAME.format(rank="*", world_size="*"))):
            try:
                content = files.read(path, KIND)
            except ValueError as error:
                warnings.warn(f"What it covers is done again: {error}", stacklevel=2)
            else:
                covered[path.name] = self._parse(*content)[0].done
        found, seen = dict[str, Done](), set[int]()
        for name, done in sorted(covered.items(), key=lambda one: -len(one[1])):
            if seen.isdisjoint(done):
                found[name] = done
                seen.update(done)
            elif seen.issuperset(done):
                (self.folder / name).unlink(missing_ok=True)
        return found

    def load(self, found: dict[str, Done], states: Sequence[Mergeable]) -> Record:
        """Merge into new states what this process's file holds.

        Rank 0 takes over the files of other numbers of ranks as well; its next write replaces them.

        Raises:
            ValueError: A file has changed since `survey` has read it.
        """
        ours = NAME.format(rank="*", world_size=self.ranks.world_size)
        if self.ranks.rank == 0:
            self._replaced = [name for name in found if not fnmatch(name, ours)]
        total = Record()
        for name in [self.name] * (self.name in found) + self._replaced:
            record, held = self._parse(*files.read(self.folder / name, KIND))
            if record.done != found[name]:
                # Merged with what will be computed, some samples would count twice.
                text = "was written by another process a moment ago. Start this run again, alone."
                raise ValueError(f"{self.folder / name} {text}")
            total.done |= record.done
            total.seen += record.seen
            total.skipped += record.skipped
            total.limit = min(filter(None, (total.limit, record.limit)), default=None)
            for own, state in zip(states, held, strict=True):
                own.merge_state_dict(state)
        self._items = len(total.done)
        return total

    def _parse(self, tensors: State, metadata: dict[str, Any]) -> tuple[Record, list[State]]:
        if metadata["settings"] != self.settings:
            raise ValueError(
                f"{self.folder} holds another run. Its settings: {metadata['settings']}; this "
                f"run's: {self.settings}. Use the same ones, or another folder."
            )
        done = dict(tensors.pop("items").tolist())
        held = apart(tensors, len(self.settings["analyzers"]))
        return Record(done, len(done), metadata["skipped"], metadata["limit"]), held

    def is_due(self, record: Record, finished: bool = False) -> bool:
        """Whether it is time to write, or there is anything to write after the last sample."""
        new = len(record.done) - self._items
        if finished:
            return new > 0 or bool(self._replaced)
        enough = self.samples is not None and new >= self.samples
        return enough or time.monotonic() - self._time >= self.seconds

    def write(self, record: Record, states: Sequence[Mergeable]) -> None:
        """Put this process's file in the place of those that it replaces."""
        items = torch.tensor(list(record.done.items()), dtype=torch.long).reshape(-1, 2)
        metadata = {"settings": self.settings, "skipped": record.skipped, "limit": record.limit}
        files.write(self.folder / self.name, KIND, {"items": items, **together(states)}, metadata)
        while self._replaced:
            (self.folder / self._replaced.pop()).unlink(missing_ok=True)
        self._time, self._items = time.monotonic(), len(record.done)

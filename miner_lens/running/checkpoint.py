"""Let a run continue where it was stopped.

Each process keeps one file, replaced whole, with its analyzers' states and the items that they have
seen. What is done is what the files say together, whoever has written them. A file that is damaged
says nothing, so its items are done again.
"""

from __future__ import annotations

import re
import time
import warnings
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from jaxtyping import Int64
from torch import Tensor

from miner_lens import files
from miner_lens.data.signature import signature
from miner_lens.running.stateful import State

KIND = "run"
LOCK = ".lock"
NAME = "rank-{rank}-of-{world_size}.safetensors"
PATTERN = re.compile(r"rank-\d+-of-\d+\.safetensors")


@dataclass
class Record:
    """What a process has done.

    Attributes:
        items: The number and the signature of each item, one after the other.
        skipped: How many of them could not be used.
        limit: The most tokens in a pass, where batches are made by length.
    """

    items: array[int] = field(default_factory=lambda: array("q"))
    skipped: int = 0
    limit: int | None = None

    def __len__(self) -> int:
        return len(self.items) // 2

    def add(self, unit: dict[int, Any], skipped: int, signed: bool = True) -> None:
        """Count items of which the analyzers have seen all that can be used."""
        for number, item in unit.items():
            self.items.extend((number, signature(item) if signed else 0))
        self.skipped += skipped

    @property
    def pairs(self) -> Int64[Tensor, "item 2"]:
        """(number, signature) of each item."""
        return torch.tensor(self.items, dtype=torch.long).reshape(-1, 2)


class Checkpoint:
    """The files of a run in a folder that all its processes share.

    A process writes after so many seconds (0: after each unit) or samples. The settings, which JSON
    can hold, must be the same for a run to be continued.
    """

    def __init__(
        self,
        folder: str | Path,
        rank: int,
        world_size: int,
        seconds: float,
        samples: int | None,
        settings: dict[str, Any],
    ) -> None:
        self.folder, self.rank = Path(folder), rank
        self.name = NAME.format(rank=rank, world_size=world_size)
        self._seconds, self._samples, self._settings = seconds, samples, settings
        self._written, self._items = time.monotonic(), 0
        self._replaced: list[str] = []

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

    def survey(self) -> dict[str, list[int]]:
        """What the intact files cover, as `Record.items`, by their names. Rank 0 does this for all.

        A file that shares items with a larger one is left out, and removed where it has no others:
        it was merged into that one, or a process went on writing after its run was over.

        Raises:
            ValueError: The files are of a run with other settings.
        """
        for half in self.folder.glob(".rank-*.safetensors.*"):  # of a write that was cut off
            half.unlink(missing_ok=True)
        records: dict[str, Record] = {}
        for path in sorted(self.folder.iterdir()):
            if PATTERN.fullmatch(path.name):
                try:
                    content = files.read(path, KIND)
                except ValueError as error:
                    warnings.warn(f"What it covers is done again: {error}", stacklevel=2)
                else:
                    records[path.name] = self._parse(*content)[0]
        found, seen = dict[str, list[int]](), set[int]()
        for name, record in sorted(records.items(), key=lambda one: -len(one[1])):
            if seen.isdisjoint(record.items[::2]):
                found[name] = record.items.tolist()
                seen.update(record.items[::2])
            elif seen.issuperset(record.items[::2]):
                (self.folder / name).unlink(missing_ok=True)
        return found

    def load(self, found: dict[str, list[int]], analyzers: Sequence[Any]) -> Record:
        """Merge into new analyzers what this process's file holds.

        Rank 0 takes over the files of other numbers of ranks as well; its next write replaces them.

        Raises:
            ValueError: A file has changed since `survey` has read it.
        """
        ours = self.name[self.name.index("-of-") :]
        if self.rank == 0:
            self._replaced = [name for name in found if not name.endswith(ours)]
        total = Record()
        for name in [self.name] * (self.name in found) + self._replaced:
            record, states = self._parse(*files.read(self.folder / name, KIND))
            if record.items.tolist() != found[name]:
                # Merged with what will be computed, some samples would count twice.
                text = "was written by another process a moment ago. Start this run again, alone."
                raise ValueError(f"{self.folder / name} {text}")
            total.items += record.items
            total.skipped += record.skipped
            total.limit = min(filter(None, (total.limit, record.limit)), default=None)
            for analyzer, state in zip(analyzers, states, strict=True):
                analyzer.merge_state_dict(state)
        self._items = len(total)
        return total

    def _parse(self, tensors: State, metadata: dict[str, Any]) -> tuple[Record, list[State]]:
        if metadata["settings"] != self._settings:
            raise ValueError(
                f"{self.folder} holds another run. Its settings: {metadata['settings']}; this "
                f"run's: {self._settings}. Use the same ones, or another folder."
            )
        items = array("q", tensors.pop("items").flatten().tolist())
        states: list[State] = [{} for _ in self._settings["analyzers"]]
        for key, tensor in tensors.items():
            number, _, name = key.partition("/")
            states[int(number)][name] = tensor
        return Record(items, metadata["skipped"], metadata["limit"]), states

    def is_due(self, record: Record, finished: bool = False) -> bool:
        """Whether it is time to write, or there is anything to write after the last sample."""
        new = len(record) - self._items
        if finished:
            return new > 0 or bool(self._replaced)
        enough = self._samples is not None and new >= self._samples
        return enough or time.monotonic() - self._written >= self._seconds

    def write(self, record: Record, analyzers: Sequence[Any]) -> None:
        """Put this process's file in the place of those that it replaces."""
        tensors = {"items": record.pairs}
        for number, analyzer in enumerate(analyzers):
            tensors |= {f"{number}/{name}": one for name, one in analyzer.state_dict().items()}
        metadata = {"settings": self._settings, "skipped": record.skipped, "limit": record.limit}
        files.write(self.folder / self.name, KIND, tensors, metadata)
        while self._replaced:
            (self.folder / self._replaced.pop()).unlink(missing_ok=True)
        self._written, self._items = time.monotonic(), len(record)

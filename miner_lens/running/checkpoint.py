"""Let a run continue where it was stopped.

Each process keeps one file, replaced whole, with its analyzers' states and the items that they have
seen. What is done is what the files say together, whoever has written them: when a run is begun,
rank 0 takes it over into its own. A file that is damaged says nothing, so its items are done again.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from miner_lens import files
from miner_lens.data.signature import item_signature
from miner_lens.running.stateful import Mergeable

KIND = "run"
LOCK = ".lock"
NAME = "rank-{rank}-of-{world_size}.safetensors"


@dataclass
class Checkpoint:
    """What a process has done in a run, and its file, if there is one.

    Attributes:
        path: The file, in a folder that all processes share; None: nothing is kept, only counted.
        state: What the items that are done have been folded into.
        settings: What must be the same for a run to be continued; JSON can hold it.
        seconds: Between two writes; 0: after each unit.
        samples: Write also after so many samples.
        done: The signature of each item that is done, by its number in the data, where it is kept.
        seen: How many items are done.
        skipped: How many of them could not be used.
        limit: The most tokens in a pass, where batches are made by length.
    """

    path: Path | None
    state: Mergeable
    settings: dict[str, Any]
    seconds: float = 0.0
    samples: int | None = None
    done: dict[int, int] = field(default_factory=dict)
    seen: int = 0
    skipped: int = 0
    limit: int | None = None
    _time: float = field(default_factory=time.monotonic)  # of the last write
    _written: int = 0  # items in it

    @contextmanager
    def reserved(self) -> Iterator[None]:
        """Keep the folder from other runs, and take over what its files say.

        Rank 0 does this for all. A killed process lets go.

        Raises:
            ValueError: Another run is using it, or it holds one with other settings.
        """
        if self.path is None:
            yield
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        lock = self.path.with_name(LOCK)
        try:
            with FileLock(lock, timeout=0):
                self._take_over(self.path)
                yield
        except Timeout as error:
            raise ValueError(
                f"Another run is using {lock.parent}. Wait for it, or give another folder. (If "
                f"there is none, its host may have died: remove {lock}.)"
            ) from error

    def add(self, unit: dict[int, Any], skipped: int, limit: int | None = None) -> None:
        """Count the items of a unit, by number, of which some could not be used."""
        if self.path is not None:
            self.done |= {number: item_signature(item) for number, item in unit.items()}
        self.seen += len(unit)
        self.skipped += skipped
        self.limit = limit

    def write(self, finished: bool = False) -> None:
        """Replace the file, if it is time, or if all is done and there is anything new."""
        new = self.seen - self._written
        enough = self.samples is not None and new >= self.samples
        late = time.monotonic() - self._time >= self.seconds
        if self.path is None or not new or not (finished or enough or late):
            return
        items = torch.tensor(list(self.done.items()), dtype=torch.long)
        told = {"settings": self.settings, "skipped": self.skipped, "limit": self.limit}
        files.write(self.path, KIND, {"items": items, **self.state.state_dict()}, told)
        self._time, self._written = time.monotonic(), self.seen

    def _take_over(self, own: Path) -> None:
        """Merge what the intact files say; afterwards all of it is in this process's own."""
        for half in own.parent.glob(".rank-*"):  # of a write that was cut off
            half.unlink(missing_ok=True)
        found = own.parent.glob(NAME.format(rank="*", world_size="*"))
        intact = list[Path]()
        # One that others were merged into comes before those, which share its items and are left
        # out; as is what a process wrote that had not noticed yet that its run was over.
        for path in sorted(found, key=lambda one: -one.stat().st_size):
            try:
                tensors, told = files.read(path, KIND)
            except ValueError as error:
                warnings.warn(f"What it covers is done again: {error}", stacklevel=2)
                continue
            there, here = told["settings"], self.settings
            if there != here:
                name = next(n for n in {**there, **here} if there.get(n) != here.get(n))
                raise ValueError(
                    f"{path.parent} holds another run: of other {name}, {there.get(name)}, where "
                    f"this run has {here.get(name)}. Use the same, or another folder."
                )
            intact.append(path)
            done = dict(tensors.pop("items").tolist())
            if self.done.keys().isdisjoint(done):
                self.done |= done
                self.skipped += told["skipped"]
                self.limit = min(filter(None, (self.limit, told["limit"])), default=None)
                self.state.merge_state_dict(tensors)
        self.seen = len(self.done)
        self._written = self.seen if intact == [own] else 0
        self.write(finished=True)
        for path in set(intact) - {own}:
            path.unlink(missing_ok=True)

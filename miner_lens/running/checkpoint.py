"""Let a run continue where it was stopped.

Each process keeps one file, replaced whole, with its analyzers' states and which items they cover.
What is done is what the files say together, whoever has written them. A file that is damaged says
nothing, so its items are done again.
"""

from __future__ import annotations

import re
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from torch import Tensor

from miner_lens import files
from miner_lens.running.shards import Covered, Digest

KIND = "run"
LOCK = ".lock"
NAME = "rank-{rank}-of-{world_size}.safetensors"
PATTERN = re.compile(r"rank-(\d+)-of-(\d+)\.safetensors")


@dataclass
class Record:
    """What one process has done.

    Attributes:
        covered: Which items.
        skipped: How many of them could not be used.
        digest: What they were.
        limit: The largest number of tokens in a pass, where batches are made by length.
    """

    covered: Covered = field(default_factory=Covered)
    skipped: int = 0
    digest: Digest = field(default_factory=Digest)
    limit: int | None = None

    def add(self, items: dict[int, Any], skipped: int) -> None:
        """Count consecutive items of which the analyzers have seen all that can be used."""
        self.covered.add(min(items), len(items))
        self.skipped += skipped
        for index, item in items.items():
            self.digest.add(index, item)

    def __add__(self, other: Record) -> Record:
        limits = [one.limit for one in (self, other) if one.limit is not None]
        return Record(
            self.covered + other.covered,
            self.skipped + other.skipped,
            self.digest + other.digest,
            min(limits, default=None),
        )

    def to_dict(self) -> dict[str, Any]:
        """The record as JSON can hold it."""
        return vars(self) | {
            "covered": self.covered.progressions,
            "digest": self.digest.levels,
            "items": len(self.covered),
        }

    @classmethod
    def from_dict(cls, saved: dict[str, Any]) -> Record:
        """The record that `to_dict` gave."""
        covered, digest = Covered(saved["covered"]), Digest(saved["digest"])
        return cls(covered, saved["skipped"], digest, saved["limit"])


class Checkpoint:
    """The files of a run in a folder that all its processes share.

    Args:
        folder: Where the files are; made if needed.
        name: This process's file.
        seconds: The time between two writes; 0 writes after each unit.
        samples: Write also after so many samples.
        settings: What must be the same for a run to be continued, as JSON can hold it.
    """

    def __init__(
        self,
        folder: str | Path,
        name: str,
        seconds: float,
        samples: int | None,
        settings: dict[str, Any],
    ) -> None:
        self.folder, self.name = Path(folder), name
        self._seconds, self._samples, self._settings = seconds, samples, settings
        self._written, self._items = time.monotonic(), 0

    @contextmanager
    def reserved(self) -> Iterator[None]:
        """Keep the folder from other runs; rank 0 does this for all. A killed process lets go.

        Raises:
            ValueError: Another run is using it.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.folder / LOCK, timeout=0)
        try:
            lock.acquire()
        except Timeout as error:
            raise ValueError(
                f"Another run is using {self.folder}. Wait for it, or give another folder. (If "
                f"there is none, its host may have died: remove {self.folder / LOCK}.)"
            ) from error
        try:
            yield
        finally:
            lock.release()

    def survey(self) -> dict[str, Any]:
        """The intact files' records, as JSON can hold them, by name. Rank 0 does this for all.

        Raises:
            ValueError: The files are of a run with other settings, or cover an item twice.
        """
        for half in self.folder.glob(".rank-*.safetensors.*"):  # of a write that was cut off
            half.unlink(missing_ok=True)
        found: dict[str, Any] = {}
        for path in sorted(self.folder.iterdir()):
            if not PATTERN.fullmatch(path.name):
                continue
            try:
                _, metadata = files.read(path, KIND)
            except ValueError as error:
                warnings.warn(f"What it covers is done again: {error}", stacklevel=2)
                continue
            settings = metadata.pop("settings")
            if settings != self._settings:
                raise ValueError(
                    f"{self.folder} holds another run. Its settings: {settings}; this "
                    f"run's: {self._settings}. Use the same ones, or another folder."
                )
            found[path.name] = metadata
        covered = [(name, Record.from_dict(one).covered) for name, one in found.items()]
        for number, (name, one) in enumerate(covered):
            for other, two in covered[:number]:
                if one.overlaps(two):
                    raise ValueError(
                        f"{name} and {other} in {self.folder} cover the same samples, so they are "
                        "of several runs. Use another folder."
                    )
        return found

    def load(self, name: str, record: Record, analyzers: Sequence[Any]) -> list[dict[str, Tensor]]:
        """A file's states, one for each analyzer.

        Raises:
            ValueError: The file has changed since `survey` read it.
        """
        tensors, metadata = files.read(self.folder / name, KIND)
        if metadata["items"] != len(record.covered):
            # Merged with what was computed since, some samples would count twice.
            raise ValueError(
                f"{self.folder / name} was written by another process while this run was going on: "
                f"it covers {metadata['items']} samples, not {len(record.covered)}. Start this run "
                "again, alone."
            )
        if name == self.name:
            self._items = len(record.covered)
        return [
            {
                key.removeprefix(f"{index}/"): tensor
                for key, tensor in tensors.items()
                if key.startswith(f"{index}/")
            }
            for index in range(len(analyzers))
        ]

    def is_due(self, record: Record, finished: bool = False) -> bool:
        """Whether it is time to write, or there is anything to write after the last sample."""
        new = len(record.covered) - self._items
        if finished:
            return new > 0
        enough = self._samples is not None and new >= self._samples
        return enough or time.monotonic() - self._written >= self._seconds

    def write(self, record: Record, analyzers: Sequence[Any]) -> None:
        """Put this process's file in the place of the one before."""
        tensors = {
            f"{index}/{name}": tensor
            for index, analyzer in enumerate(analyzers)
            for name, tensor in analyzer.state_dict().items()
        }
        metadata = record.to_dict() | {"settings": self._settings}
        files.write(self.folder / self.name, KIND, tensors, metadata)
        self._written, self._items = time.monotonic(), len(record.covered)

"""Let a run continue where it was stopped."""

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
from miner_lens.running.shares import Digest, Leg

KIND = "run"
LOCK = ".lock"
NAME = "leg-{leg}.rank-{rank}-of-{world}.{slot}.safetensors"
PATTERN = re.compile(r"leg-(\d+)\.rank-(\d+)-of-(\d+)\.(\d)\.safetensors")


@dataclass
class Record:
    """What one rank has done in one leg of a run; see `shares.Leg`.

    Attributes:
        leg: How many times the number of ranks has changed before.
        rank: Whose record this is.
        before: The legs before this one.
        world: How many ranks there are.
        units: How many units are finished.
        part: Which items are finished of the next unit, counted within it.
        items: How many items that makes.
        skipped: How many of them could not be used.
        digest: Which items they were.
        limit: The largest number of tokens in a pass, where batches are made by length.
        writes: How often this was written.
    """

    leg: int
    rank: int
    world: int
    before: list[Any]
    units: int = 0
    part: list[int] = field(default_factory=list)
    items: int = 0
    skipped: int = 0
    digest: Digest = field(default_factory=Digest)
    limit: int | None = None
    writes: int = 0

    def note(self, items: dict[int, Any], skipped: int, start: int) -> None:
        """Count items that the analyzers have just folded, of the unit that begins at `start`."""
        for index, item in items.items():
            self.digest.add(index, item)
            self.part.append(index - start)
        self.items += len(items)
        self.skipped += skipped

    def complete(self) -> None:
        """Count a unit of which all items are done."""
        self.units += 1
        self.part = []

    def to_dict(self) -> dict[str, Any]:
        """The record as JSON can hold it."""
        return vars(self) | {"digest": self.digest.levels}

    @classmethod
    def from_dict(cls, saved: dict[str, Any]) -> Record:
        """The record that `to_dict` gave."""
        return cls(**(saved | {"digest": Digest(saved["digest"])}))


@dataclass(frozen=True)
class Past:
    """What a run has done before.

    Attributes:
        legs: All legs; the last is to be continued.
        records: Of the last leg, by rank; None where a rank has written nothing.
        names: The files of the last leg's records.
        earlier: The files of earlier legs, each with how many items its record covers.
        items: Items done before.
        skipped: How many of them could not be used.
        digest: Which items they were.
        limit: The smallest limit on tokens that any rank has come to.
    """

    legs: list[Leg]
    records: list[Record | None]
    names: list[str]
    earlier: list[tuple[str, int]]
    items: int
    skipped: int
    digest: Digest
    limit: int | None

    @classmethod
    def none(cls, world: int) -> Past:
        """Nothing was done before."""
        return cls([Leg.fresh(world)], [None] * world, [""] * world, [], 0, 0, Digest(), None)

    def to_dict(self) -> dict[str, Any]:
        """The past as JSON can hold it."""
        return vars(self) | {
            "legs": [leg.to_list() for leg in self.legs],
            "records": [record and record.to_dict() for record in self.records],
            "digest": self.digest.levels,
        }

    @classmethod
    def from_dict(cls, saved: dict[str, Any]) -> Past:
        """The past that `to_dict` gave."""
        return cls(
            **saved
            | {
                "legs": [Leg.from_list(leg) for leg in saved["legs"]],
                "records": [record and Record.from_dict(record) for record in saved["records"]],
                "earlier": [(name, items) for name, items in saved["earlier"]],
                "digest": Digest(saved["digest"]),
            }
        )

    def record(self, rank: int) -> Record:
        """Where a rank goes on."""
        known = self.records[rank]
        if known is not None:
            return known
        before = [leg.to_list() for leg in self.legs[:-1]]
        world = self.legs[-1].world
        return Record(len(before), rank, world, before, limit=self.limit)


@dataclass(frozen=True)
class Kept:
    """An intact file."""

    name: str
    record: Record


class Checkpoint:
    """The states of a run's analyzers on disk, with what is needed to continue safely.

    Each rank writes two files in turn, each whole or not at all, so that there is an intact one at
    any moment, also while the other is being written or if it is damaged later. When the number of
    ranks changes a new leg begins, with files of its own; those of earlier legs stay as they are,
    and are merged at the end.

    Args:
        folder: Where the files are, shared by all ranks; made if needed.
        seconds: The time between two writes; 0 writes after each forward pass.
        samples: Write also after so many samples of a rank.
        settings: What must be the same for a run to be continued, as JSON can hold it.
    """

    def __init__(
        self, folder: str | Path, seconds: float, samples: int | None, settings: dict[str, Any]
    ) -> None:
        self.folder = Path(folder)
        self._seconds = seconds
        self._samples = samples
        self._settings = settings
        self._written = time.monotonic()
        self._items = 0

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

    def past(self, world: int) -> Past:
        """Read what the folder tells, to continue with so many ranks. Rank 0 does this for all.

        Raises:
            ValueError: The files are of a run with other settings, or what is needed of them is
                damaged.
        """
        found = self._survey()
        self._tidy()
        if not found:
            return Past.none(world)
        last = max(leg for leg, _ in found)
        latest = {rank: kept[0] for (leg, rank), kept in found.items() if leg == last}
        some = next(iter(latest.values())).record
        earlier = list(self._built_upon(found, some.before))
        if any(
            (one.record.world, one.record.before) != (some.world, some.before)
            for one in latest.values()
        ):
            raise ValueError(f"{self.folder} holds files of several runs. Use another folder.")
        ranks = range(some.world)
        records = [latest[rank].record if rank in latest else None for rank in ranks]
        names = [latest[rank].name if rank in latest else "" for rank in ranks]
        legs = [Leg.from_list(leg) for leg in some.before]
        legs.append(
            Leg(
                tuple(record.units if record else 0 for record in records),
                tuple(tuple(record.part) if record else () for record in records),
            )
        )
        all_kept = [*earlier, *latest.values()]
        if some.world != world:
            earlier = all_kept
            for one in earlier:
                self._double(one.name)
            legs.append(Leg.fresh(world))
            records, names = [None] * world, [""] * world
        return Past(
            legs,
            records,
            names,
            [(one.name, one.record.items) for one in earlier],
            sum(one.record.items for one in all_kept),
            sum(one.record.skipped for one in all_kept),
            sum((one.record.digest for one in all_kept), Digest()),
            min((o.record.limit for o in all_kept if o.record.limit is not None), default=None),
        )

    def restore(self, name: str, record: Record, analyzers: Sequence[Any]) -> None:
        """Put a file's states into the analyzers, to continue its record."""
        self._items = record.items
        for analyzer, state in zip(
            analyzers, self._states(name, len(analyzers), record.items), strict=True
        ):
            analyzer.restore(state)

    def earlier(self, past: Past, analyzers: int) -> Iterator[list[dict[str, Tensor]]]:
        """The states of each file of the earlier legs, one for each analyzer.

        Raises:
            ValueError: A file has changed since `past` read it.
        """
        for name, items in past.earlier:
            yield self._states(name, analyzers, items)

    def _states(self, name: str, analyzers: int, items: int) -> list[dict[str, Tensor]]:
        tensors, metadata = files.read(self.folder / name, KIND)
        if metadata["items"] != items:
            # Merged with what was computed since, some samples would count twice.
            raise ValueError(
                f"{self.folder / name} was written by another process while this run was going on: "
                f"it covers {metadata['items']} samples, not {items}. Start this run again, alone."
            )
        return [
            {
                key.removeprefix(f"{index}/"): tensor
                for key, tensor in tensors.items()
                if key.startswith(f"{index}/")
            }
            for index in range(analyzers)
        ]

    def is_due(self, record: Record, finished: bool = False) -> bool:
        """Whether it is time to write, or there is anything to write after the last sample."""
        if finished:
            return record.items > self._items
        enough = self._samples is not None and record.items - self._items >= self._samples
        return enough or time.monotonic() - self._written >= self._seconds

    def write(self, record: Record, analyzers: Sequence[Any]) -> None:
        """Write the states; the file before this one stays until the next write."""
        tensors = {
            f"{index}/{name}": tensor
            for index, analyzer in enumerate(analyzers)
            for name, tensor in analyzer.state().items()
        }
        record.writes += 1
        name = NAME.format(
            leg=record.leg, rank=record.rank, world=record.world, slot=record.writes % 2
        )
        metadata = record.to_dict() | {"settings": self._settings}
        files.write(self.folder / name, KIND, tensors, metadata)
        self._written = time.monotonic()
        self._items = record.items

    def _survey(self) -> dict[tuple[int, int], list[Kept]]:
        """The intact files by leg and rank, the newest first."""
        found: dict[tuple[int, int], list[Kept]] = {}
        damaged: dict[tuple[int, int], str] = {}
        for name, leg, rank in self._names():
            try:
                _, metadata = files.read(self.folder / name, KIND)
            except (ValueError, KeyError) as error:
                damaged[leg, rank] = str(error)
                continue
            settings = metadata.pop("settings")
            if settings != self._settings:
                raise ValueError(
                    f"{self.folder} holds another run. Its settings: {settings}; this "
                    f"run's: {self._settings}. Use the same ones, or another folder."
                )
            found.setdefault((leg, rank), []).append(Kept(name, Record.from_dict(metadata)))
        for place, problem in damaged.items():
            if place not in found:
                raise ValueError(f"No intact checkpoint in {self.folder}: {problem}")
            warnings.warn(f"Continuing from the checkpoint before: {problem}", stacklevel=2)
        for kept in found.values():
            kept.sort(key=lambda one: -one.record.writes)
        return found

    def _names(self) -> Iterator[tuple[str, int, int]]:
        if self.folder.is_dir():
            for path in sorted(self.folder.iterdir()):
                if match := PATTERN.fullmatch(path.name):
                    yield path.name, int(match[1]), int(match[2])

    def _built_upon(
        self, found: dict[tuple[int, int], list[Kept]], before: list[Any]
    ) -> Iterator[Kept]:
        """The files of the earlier legs that the last leg has dealt out the rest of."""
        for leg, (done, parts) in enumerate(before):
            for rank, did in enumerate(zip(done, parts, strict=True)):
                if not any(did):
                    continue
                for one in found.get((leg, rank), ()):
                    if (one.record.units, one.record.part) == did:
                        yield one
                        break
                else:
                    raise ValueError(
                        f"No intact checkpoint in {self.folder}: what rank {rank} did in leg {leg} "
                        "is missing or damaged, and later files build upon it. Start again in "
                        "another folder."
                    )

    def _double(self, name: str) -> None:
        """Put a copy in the place of the write before, for a leg that will not be written again."""
        match = PATTERN.fullmatch(name)
        assert match is not None
        leg, rank, world, slot = map(int, match.groups())
        twin = NAME.format(leg=leg, rank=rank, world=world, slot=1 - slot)
        files.write(self.folder / twin, KIND, *files.read(self.folder / name, KIND))

    def _tidy(self) -> None:
        """Remove what writes that were cut off have left."""
        for path in self.folder.glob(".leg-*.safetensors.*"):
            path.unlink(missing_ok=True)

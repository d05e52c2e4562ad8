"""Which samples are whose: the data dealt out to processes, also after earlier ones have stopped.

The data are cut into units of consecutive items. Units are dealt to ranks in turn, so what goes
through the model together depends on the data and the batch size, never on how many ranks there
are. What is finished is kept as a short list of legs, one for each number of ranks that the run has
had; its length does not grow with the data.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count, islice
from typing import Any

from torch.utils.data import IterableDataset

from miner_lens.data.sample import Sample

LEVELS = 32
# A data set that makes its items when asked for them is spot-checked with about so many.
SPOT_CHECKS = 1_000


@dataclass(frozen=True)
class Leg:
    """What ranks have finished while their number stayed the same.

    Attributes:
        done: How many of its units each rank has finished.
        parts: Which items each rank has finished of its next unit, counted within the unit.
    """

    done: tuple[int, ...]
    parts: tuple[tuple[int, ...], ...]

    @classmethod
    def fresh(cls, world: int) -> Leg:
        """A leg in which nothing is done yet."""
        return cls((0,) * world, ((),) * world)

    @property
    def world(self) -> int:
        """How many ranks there are."""
        return len(self.done)

    def to_list(self) -> list[Any]:
        """The leg as JSON can hold it."""
        return [list(self.done), [list(part) for part in self.parts]]

    @classmethod
    def from_list(cls, saved: Sequence[Any]) -> Leg:
        """The leg that `to_list` gave."""
        return cls(tuple(saved[0]), tuple(tuple(part) for part in saved[1]))


def deal(legs: Sequence[Leg]) -> Iterator[tuple[int | None, frozenset[int]]]:
    """Whose turn each unit is, in the order of the units, without end.

    Each leg deals what the legs before it have left: its j-th unit to rank j modulo its number of
    ranks.

    Args:
        legs: All legs so far; units that are left are the last one's.

    Yields:
        The rank of the last leg, or None where the unit is finished; and the items finished of it.

    Example:
        >>> first = Leg(done=(2,), parts=((1,),))
        >>> [rank for rank, _ in islice(deal([first, Leg.fresh(2)]), 6)]
        [None, None, 0, 1, 0, 1]
        >>> [sorted(done) for _, done in islice(deal([first, Leg.fresh(2)]), 4)]
        [[], [], [1], []]
    """
    dealt = [0] * len(legs)
    for _ in count():
        part: set[int] = set()
        rank: int | None = None
        for index, leg in enumerate(legs):
            turn, rank = divmod(dealt[index], leg.world)
            dealt[index] += 1
            if turn < leg.done[rank]:
                rank = None
                break
            if turn == leg.done[rank]:
                part.update(leg.parts[rank])
        yield rank, frozenset(part)


class Digest:
    """Tells whether the items of a run are the ones of the run before, in any order.

    Level 0 sums a hash of every item; level n of those whose index is a multiple of 2 ** n, for
    checking with fewer of them.
    """

    def __init__(self, levels: Sequence[int] = (0,) * LEVELS) -> None:
        self.levels = list(levels)

    def add(self, index: int, item: Any) -> None:
        """Count an item."""
        text = f"{index}:".encode() + signature(item)
        value = int.from_bytes(hashlib.sha256(text).digest()[:8], "big")
        for level in range(LEVELS):
            if index % (1 << level):
                break
            self.levels[level] = (self.levels[level] + value) % (1 << 64)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Digest) and self.levels == other.levels

    def __add__(self, other: Digest) -> Digest:
        pairs = zip(self.levels, other.levels, strict=True)
        return Digest([(one + two) % (1 << 64) for one, two in pairs])


def signature(item: Any) -> bytes:
    """What tells one item from another, without opening its media."""
    if isinstance(item, Sample):
        return repr((item.id, [_words(message) for message in item.messages])).encode()
    if not (isinstance(item, tuple | list) and item and isinstance(item[0], Mapping)):
        return type(item).__name__.encode()  # refused when its turn comes
    ids = item[0].get("input_ids", item[0].get("input"))
    return b"" if ids is None else bytes(ids.cpu().contiguous().numpy().tobytes())


def _words(message: Any) -> Any:
    content = message.get("content") if isinstance(message, Mapping) else None
    if not isinstance(content, list | tuple):
        return content if isinstance(content, str) else type(content).__name__
    return [p.get("text", p.get("type")) if isinstance(p, Mapping) else "" for p in content]


class Items:
    """The items of the data by number: looked up where the data can be, walked along otherwise.

    Looking up makes nothing in vain: a rank opens its own items only.
    """

    def __init__(self, data: Any, limit: int | None) -> None:
        self.length = length(data, limit)
        self._data = data
        self._indexed = (
            hasattr(data, "__len__")
            and hasattr(data, "__getitem__")
            and not isinstance(data, Mapping | IterableDataset)
        )
        # Walking makes all items anyway, and a list has them.
        self.free = not self._indexed or isinstance(data, list | tuple)
        self._walk = iter(()) if self._indexed else iter(data)
        if limit is not None:
            self._walk = islice(self._walk, limit)

    def read(
        self, start: int, stop: int, wanted: Callable[[int], bool]
    ) -> tuple[int, dict[int, Any]]:
        """Items from one number to another, to be called with growing numbers.

        Args:
            start: The first.
            stop: The first after them.
            wanted: Which of the numbers are asked for.

        Returns:
            How many there are, wanted or not, and the wanted ones by number.
        """
        if self._indexed:
            assert self.length is not None
            stop = min(stop, self.length)
            found = {index: self._data[index] for index in range(start, stop) if wanted(index)}
            return max(0, stop - start), found
        walked = list(enumerate(islice(self._walk, stop - start), start))
        return len(walked), {index: item for index, item in walked if wanted(index)}

    def probe(self) -> list[str]:
        """Signatures of a few items, where they can be looked up, to compare between ranks."""
        if not self._indexed or not self.length:
            return []
        places = (0, self.length // 2, self.length - 1)
        return [hashlib.sha256(signature(self._data[one])).hexdigest()[:16] for one in places]


def length(data: Any, limit: int | None) -> int | None:
    """How many items there are, where that is known."""
    try:
        known = len(data)
    except TypeError:
        return limit
    return known if limit is None else min(known, limit)


class OtherDataError(ValueError):
    """The data are not the ones that were begun with."""


@dataclass(frozen=True)
class Unit:
    """Consecutive items that are one rank's.

    Attributes:
        items: Those that are not done, by number.
        start: The number of the unit's first item.
        full: Whether the data do not end within it.
    """

    items: dict[int, Any]
    start: int
    full: bool


class Share:
    """One rank's units of the data, with what was done before passed over and checked.

    Args:
        items: The data.
        size: Items in a unit.
        legs: What was done before; the last leg is this run's.
        rank: Whose share.
        before: How many items were done before, and the digest of all of them.
    """

    def __init__(
        self, items: Items, size: int, legs: Sequence[Leg], rank: int, before: tuple[int, Digest]
    ) -> None:
        self._items = items
        self._size = size
        self._legs = legs
        self._rank = rank
        self._total, self._expected = before
        self._level = 0
        while not items.free and self._total >> self._level > SPOT_CHECKS:
            self._level += 1
        self._passed = 0
        self._digest = Digest()

    @property
    def checked(self) -> bool:
        """Whether all that was done before has been passed over, and was the same data."""
        return self._passed == self._total and self._alike()

    def __iter__(self) -> Iterator[Unit]:
        """This rank's units.

        Raises:
            OtherDataError: What was done before was done with other data.
        """
        self._check()
        size = self._size
        for number, (owner, part) in enumerate(deal(self._legs)):
            start = number * size
            done = range(start, start + size) if owner is None else {start + one for one in part}
            wanted = self._wanted(done, owner == self._rank)
            there, found = self._items.read(start, start + size, wanted)
            if self._passed < self._total:
                self._pass_over(
                    sum(index < start + there for index in done),
                    {index: item for index, item in found.items() if index in done},
                )
            unit = {index: item for index, item in found.items() if index not in done}
            full = there == size
            if owner == self._rank and (unit or full):
                yield Unit(unit, start, full)
            if not full:
                break
        if self._passed < self._total:
            raise OtherDataError(
                f"{self._total} items were done before, but only {self._passed} of them are there "
                "now."
            )

    def _wanted(self, done: Container[int], mine: bool) -> Callable[[int], bool]:
        step, checking = 1 << self._level, self._passed < self._total

        def wanted(index: int) -> bool:
            if index in done:
                return checking and index % step == 0
            return mine

        return wanted

    def _pass_over(self, count: int, items: Mapping[int, Any]) -> None:
        for index, item in items.items():
            self._digest.add(index, item)
        self._passed += count
        self._check()

    def _check(self) -> None:
        if self._passed == self._total and not self._alike():
            raise OtherDataError(f"the {self._total} items done before differ from the ones now.")

    def _alike(self) -> bool:
        return self._digest.levels[self._level] == self._expected.levels[self._level]

"""Which samples are whose: the data dealt out to processes, also after earlier ones have stopped.

The data are cut into units of consecutive items. Unit u is rank u modulo world_size's, so what goes
through the model together depends on the data and the batch size, never on how many ranks there
are. What is done is a set of item numbers, whoever has done them, kept as a few progressions; what
is left when the number of ranks has changed is dealt out anew, in turn.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count, islice
from typing import Any

from torch.utils.data import IterableDataset

from miner_lens.data.sample import Sample

LEVELS = 32
# A data set that makes its items when asked for them is spot-checked with about so many.
SPOT_CHECKS = 1_000


class Covered:
    """A set of item numbers, made of blocks of consecutive ones in even steps.

    Its length grows with how irregular it is, not with the data: what a rank has done of data that
    are dealt in turn is one progression.

    Example:
        >>> covered = Covered()
        >>> for start in (0, 6, 12):
        ...     covered.add(start, 3)
        >>> covered.progressions, len(covered)
        ([[0, 3, 6, 3]], 9)
        >>> 7 in covered, 9 in covered
        (True, False)
    """

    def __init__(self, progressions: Iterable[Sequence[int]] = ()) -> None:
        # [first item, items in a block, step from block to block, number of blocks] each
        self.progressions = [list(one) for one in progressions]

    def add(self, start: int, length: int) -> None:
        """Add a block of items, none of which is in the set."""
        if self.progressions:
            last = self.progressions[-1]
            first, size, step, blocks = last
            follows = start == first + step * blocks if blocks > 1 else start >= first + size
            if length == size and follows:
                last[2:] = [start - first if blocks == 1 else step, blocks + 1]
                return
        self.progressions.append([start, length, 1, 1])

    def __contains__(self, item: int) -> bool:
        for first, size, step, blocks in self.progressions:
            block = min((item - first) // step, blocks - 1)
            if item >= first and item - first - block * step < size:
                return True
        return False

    def __len__(self) -> int:
        return sum(size * blocks for _, size, _, blocks in self.progressions)

    def __add__(self, other: Covered) -> Covered:
        return Covered(self.progressions + other.progressions)

    def overlaps(self, other: Covered) -> bool:
        """Whether any item is in both."""
        return any(
            item in other
            for first, size, step, blocks in self.progressions
            for start in range(first, first + step * blocks, step)
            for item in range(start, start + size)
        )


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
            found = {i: _sample(self._data[i]) for i in range(start, stop) if wanted(i)}
            return max(0, stop - start), found
        walked = list(enumerate(islice(self._walk, stop - start), start))
        return len(walked), {index: _sample(item) for index, item in walked if wanted(index)}

    def probe(self) -> list[str]:
        """Signatures of a few items, where they can be looked up, to compare between ranks."""
        if not self._indexed or not self.length:
            return []
        places = (0, self.length // 2, self.length - 1)
        return [hashlib.sha256(signature(_sample(self._data[one]))).hexdigest()[:16] for one in places]


def _sample(item: Any) -> Any:
    """A mapping with messages is a sample, as rows of tables are."""
    return Sample.of(item) if isinstance(item, Mapping) and "messages" in item else item


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
    """Consecutive items that are one rank's: those that are not done, by number."""

    items: dict[int, Any]


class Shard:
    """One rank's units of the data, with what was done before passed over and checked.

    Args:
        items: The data.
        size: Items in a unit.
        rank: Whose shard.
        world_size: How many ranks there are.
        done: What was done before, by any process.
        expected: The digest of that.
        in_turn: Whether what is left is dealt in turn, as after a change of world_size.
    """

    def __init__(
        self,
        items: Items,
        size: int,
        rank: int,
        world_size: int,
        done: Covered,
        expected: Digest,
        in_turn: bool,
    ) -> None:
        self._items, self._size = items, size
        self._rank, self._world_size, self._in_turn = rank, world_size, in_turn
        self._done, self._expected, self._digest = done, expected, Digest()
        self._level = self._passed = 0
        while not items.free and len(done) >> self._level > SPOT_CHECKS:
            self._level += 1

    @property
    def checked(self) -> bool:
        """Whether all that was done before has been passed over, and was the same data."""
        return self._passed == len(self._done) and self._alike()

    def __iter__(self) -> Iterator[Unit]:
        """This rank's units.

        Raises:
            OtherDataError: What was done before was done with other data.
        """
        self._check()
        left = 0
        for number in count():
            start = number * self._size
            block = range(start, start + self._size)
            # The end of the data may lie within a block: what is not there is not done, either.
            done = {item for item in block if item in self._done}
            turn = left if self._in_turn else number
            mine = turn % self._world_size == self._rank
            left += len(done) < self._size
            there, found = self._items.read(block.start, block.stop, self._wanted(done, mine))
            self._pass_over({item for item in done if item < start + there}, found)
            unit = {index: item for index, item in found.items() if index not in done}
            if mine and unit:
                yield Unit(unit)
            if there < self._size:
                break
        if self._passed < len(self._done):
            raise OtherDataError(
                f"{len(self._done)} items were done before, but only {self._passed} of them are "
                "there now."
            )

    def _wanted(self, done: set[int], mine: bool) -> Callable[[int], bool]:
        step, checking = 1 << self._level, self._passed < len(self._done)
        return lambda index: checking and index % step == 0 if index in done else mine

    def _pass_over(self, done: set[int], found: Mapping[int, Any]) -> None:
        if self._passed < len(self._done):
            for index in done & found.keys():
                self._digest.add(index, found[index])
            self._passed += len(done)
            self._check()

    def _check(self) -> None:
        if self._passed == len(self._done) and not self._alike():
            raise OtherDataError(f"the {self._passed} items done before differ from the ones now.")

    def _alike(self) -> bool:
        return self._digest.levels[self._level] == self._expected.levels[self._level]

"""Which items of the data are whose, and which are done already."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import count, islice
from typing import Any

from torch.utils.data import IterableDataset

from miner_lens.data.items import item_of
from miner_lens.data.signature import signature
from miner_lens.running.distributed import Ranks

# Items that are done are looked up again to compare them; where each look-up makes one, so many.
SPOT_CHECKS = 1_000

OTHER_DATA = (
    "The checkpoint was written over other data: now {what}. Give the same data in the same order, "
    "or another folder."
)


class Items:
    """The items of the data by number: looked up where they can be, walked along otherwise."""

    def __init__(self, data: Any, limit: int | None) -> None:
        self.indexed = (
            hasattr(data, "__len__")
            and hasattr(data, "__getitem__")
            and not isinstance(data, Mapping | IterableDataset)
        )
        # Walking makes all items anyway, and a list has them.
        self.free = not self.indexed or isinstance(data, list | tuple)
        lengths = [len(data)] if hasattr(data, "__len__") else []
        self.length = min([*lengths, *([] if limit is None else [limit])], default=None)
        self._data: Any = data if self.indexed else islice(iter(data), limit)

    def units(self, size: int) -> Iterator[tuple[range, Callable[[int], Any]]]:
        """Consecutive numbers, so many at a time, with what looks up an item of theirs."""
        for start in count(0, size):
            look_up: Callable[[int], Any] = self.look_up
            if self.indexed:
                numbers = range(start, min(start + size, self.length or 0))
            else:
                walked = [item_of(item) for item in islice(self._data, size)]
                numbers = range(start, start + len(walked))
                look_up = dict(zip(numbers, walked, strict=True)).__getitem__
            if numbers:
                yield numbers, look_up
            if len(numbers) < size:
                return

    def look_up(self, number: int) -> Any:
        """An item of data that can be indexed."""
        return item_of(self._data[number])


@dataclass
class Shard:
    """One rank's units of the data: unit u is rank u modulo world_size's.

    So what goes through the model together depends on the data and the unit's size alone, never on
    how many ranks there are. What is done, whoever has done it, is given by number and signature;
    it is compared with the data and passed over.
    """

    items: Items
    size: int
    ranks: Ranks
    done: Mapping[int, int]
    _compared: int = 0

    @property
    def checked(self) -> bool:
        """Whether all that is done has been compared, and is the same now."""
        return self._compared == len(self.done)

    def __iter__(self) -> Iterator[dict[int, Any]]:
        """The items of each unit that are not done, by number.

        Raises:
            ValueError: What is done was done with other data.
        """
        if self.items.indexed:
            self._compare(range(self.items.length or 0), self.items.look_up)
        for unit, (numbers, look_up) in enumerate(self.items.units(self.size)):
            if not self.items.indexed:
                self._compare(numbers, look_up)
            left = [number for number in numbers if number not in self.done]
            if left and unit % self.ranks.world_size == self.ranks.rank:
                yield {number: look_up(number) for number in left}
        if not self.checked:
            raise ValueError(OTHER_DATA.format(what=f"it has only {self._compared} of the items"))

    def _compare(self, numbers: range, look_up: Callable[[int], Any]) -> None:
        done = [number for number in numbers if number in self.done]
        step = 1 if self.items.free else max(1, len(self.done) // SPOT_CHECKS)
        for number in done[::step]:
            if signature(look_up(number)) != self.done[number]:
                raise ValueError(OTHER_DATA.format(what=f"item {number} is another"))
        self._compared += len(done)

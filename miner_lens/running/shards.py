"""Which items of the data are whose, and which are done already."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import count, islice
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor
from torch.utils.data import IterableDataset

from miner_lens.data.items import item_of
from miner_lens.data.signature import signature

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


class Shard:
    """One rank's units of the data: unit u is rank u modulo world_size's.

    So what goes through the model together depends on the data and the unit's size alone, never on
    how many ranks there are. What is done, whoever has done it, is given by number and signature;
    it is compared with the data and passed over.
    """

    def __init__(
        self, items: Items, size: int, rank: int, world_size: int, done: Int64[Tensor, "item 2"]
    ) -> None:
        self._items, self._size, self._rank, self._world_size = items, size, rank, world_size
        self._numbers, self._signatures = done[done[:, 0].argsort()].T.contiguous()
        self._passed, self._step = 0, 1 if items.free else max(1, len(done) // SPOT_CHECKS)

    @property
    def checked(self) -> bool:
        """Whether all that is done has been passed over, and is the same now."""
        return self._passed == len(self._numbers)

    def __iter__(self) -> Iterator[dict[int, Any]]:
        """The items of each unit that are not done, by number.

        Raises:
            ValueError: What is done was done with other data.
        """
        if self._items.indexed:
            self._pass_over(range(self._items.length or 0), self._items.look_up)
        for unit, (numbers, look_up) in enumerate(self._items.units(self._size)):
            if not self._items.indexed:
                self._pass_over(numbers, look_up)
            done = set(self._numbers[self._places(numbers)].tolist())
            if unit % self._world_size == self._rank and len(done) < len(numbers):
                yield {number: look_up(number) for number in numbers if number not in done}
        if not self.checked:
            raise ValueError(OTHER_DATA.format(what=f"it has only {self._passed} items"))

    def _places(self, numbers: range) -> slice:
        """Where among the items that are done those of a range of numbers are."""
        ends = torch.tensor([numbers.start, numbers.stop])
        return slice(*torch.searchsorted(self._numbers, ends).tolist())

    def _pass_over(self, numbers: range, look_up: Callable[[int], Any]) -> None:
        places = self._places(numbers)
        for place in range(places.start, places.stop, self._step):
            number = int(self._numbers[place])
            if signature(look_up(number)) != int(self._signatures[place]):
                raise ValueError(OTHER_DATA.format(what=f"item {number} is another"))
        self._passed = places.stop

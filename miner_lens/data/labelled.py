"""Several data sets as one, each sample labelled by the name of its own."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from miner_lens.data.sample import Sample


def labelled(data: Mapping[str, Iterable[Any]]) -> Sequence[Sample] | Iterator[Sample]:
    """The samples of data sets by name, one set after the other; by index if all can be.

    Raises:
        ValueError: An item is no sample.
    """
    indexed = (hasattr(one, "__len__") and hasattr(one, "__getitem__") for one in data.values())
    return _Concatenated(data) if all(indexed) else _walk(data)


def _walk(data: Mapping[str, Iterable[Any]]) -> Iterator[Sample]:
    for label, items in data.items():
        for item in items:
            yield replace(Sample.of(item), label=label)


class _Concatenated(Sequence[Sample]):
    def __init__(self, data: Mapping[str, Any]) -> None:
        self._data = data

    def __len__(self) -> int:
        return sum(map(len, self._data.values()))

    def __getitem__(self, index: Any) -> Any:
        for label, items in self._data.items():
            if index < len(items):
                return replace(Sample.of(items[index]), label=label)
            index -= len(items)
        raise IndexError(index)

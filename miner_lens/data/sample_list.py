"""What every data set is made of: a named list of samples, a seeded draw, a question."""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import Any, SupportsIndex, overload

from miner_lens.data.sample import Sample


class SampleList(list[Sample]):
    """Samples that know what data set they are, for the scores mined from them; so do slices.

    `metrics` are the names of those by which `ml.evaluate` measures their answers.
    """

    def __init__(
        self, samples: Iterable[Sample], name: str, metrics: Iterable[str] = ("exact_match",)
    ) -> None:
        super().__init__(samples)
        self.name = name
        self.metrics = tuple(metrics)

    @overload
    def __getitem__(self, index: SupportsIndex) -> Sample: ...

    @overload
    def __getitem__(self, index: slice) -> SampleList: ...

    def __getitem__(self, index: SupportsIndex | slice) -> Sample | SampleList:
        if isinstance(index, slice):
            return SampleList(super().__getitem__(index), self.name, self.metrics)
        return super().__getitem__(index)


def draw(rows: list[Any], limit: int | None, times: int) -> list[Any]:
    """As many rows as make `limit` samples where each makes `times`: a seeded draw, in order."""
    if limit is None:
        return rows
    places = list(range(len(rows)))
    random.Random(0).shuffle(places)
    return [rows[place] for place in sorted(places[: -(-limit // times)])]


def user_sample(name: str, content: list[dict[str, Any]], answer: str) -> Sample:
    """One question in the user's turn, with one accepted answer."""
    return Sample([{"role": "user", "content": content}], (answer,), name)


def check_known(what: str, given: str, known: Iterable[str]) -> None:
    """Refuse a name that is not known.

    Raises:
        ValueError: It is unknown; the error says what there is.
    """
    if given not in known:
        raise ValueError(f"Unknown {what} {given!r}; there is {', '.join(map(repr, known))}.")

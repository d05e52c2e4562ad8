"""Tables as data sets: each row is made a sample when it is asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, overload

from torch.utils.data import IterableDataset, Subset

from miner_lens.data.sample import Sample

Row = Mapping[str, Any]
# The name of a column, or what to make of a row.
Column = str | Callable[[Row], Any]


def from_rows(
    rows: Iterable[Row],
    messages: Column = "messages",
    answers: Column | None = None,
    id: Column | None = None,
    label: Column | None = None,
    metrics: Iterable[str] = ("exact_match",),
) -> Rows | RowStream:
    """Take a table as a data set, whatever its columns are called.

    Nothing is read before it is needed: of a table that has a length and is read by number, such as
    a `datasets.Dataset` or a list of dicts, single rows; any other is read row by row.

    Args:
        rows: A `datasets.Dataset` or `datasets.IterableDataset`, a list of dicts, a pandas
            DataFrame, or anything else that gives mappings of column names to values.
        messages: The column that holds the conversation; or a function of the row that makes one,
            where the table holds question and image apart.
        answers: The column, or a function, of the accepted answers: a string or a list of them.
        id: The column, or a function, of what error messages and tables call the sample.
        label: The column, or a function, of the sample's group.
        metrics: The names of those by which `ml.evaluate` measures answers.

    Returns:
        A sequence of samples if the rows are one, and otherwise an iterable.

    Raises:
        TypeError: When a row is read: it is no mapping, or its answers are no strings.
        ValueError: When a row is read: it has no such column, or no messages.

    Example:
        >>> table = [{"question": "2 + 2?", "truth": "4"}]
        >>> data = from_rows(
        ...     table,
        ...     messages=lambda row: [{"role": "user", "content": row["question"]}],
        ...     answers="truth",
        ... )
        >>> len(data), data[0].answers
        (1, ('4',))
    """
    columns = {"messages": messages, "answers": answers, "id": id, "label": label}
    make = _Maker({what: column for what, column in columns.items() if column is not None})
    if hasattr(rows, "iloc") and hasattr(rows, "to_dict"):  # a DataFrame, whose [0] is a column
        rows = rows.to_dict("records")
    by_number = hasattr(rows, "__len__") and hasattr(rows, "__getitem__")
    if by_number and not isinstance(rows, Mapping | IterableDataset):
        return Rows(rows, make, metrics)
    return RowStream(rows, make, metrics)


@dataclass(frozen=True)
class _Maker:
    """Makes samples of rows."""

    columns: Mapping[str, Column]

    def __call__(self, row: Row) -> Sample:
        if not isinstance(row, Mapping):
            raise TypeError(
                f"A row must be a mapping of column names to values, not {type(row).__name__}. Of "
                "a table that is no DataFrame of pandas, give a list of dicts."
            )
        return Sample.of({what: self._value(row, what) for what in self.columns})

    def _value(self, row: Row, what: str) -> Any:
        column = self.columns[what]
        if callable(column):
            return column(row)
        if column not in row:
            raise ValueError(
                f"There is no column {column!r} for the {what}; the columns are "
                f"{', '.join(map(repr, row))}. Name one of them: from_rows(rows, {what}=...)."
            )
        return row[column]


class Rows(Sequence[Sample]):
    """The samples of a table that is read by number."""

    def __init__(
        self,
        rows: Any,
        make: Callable[[Row], Sample],
        metrics: Iterable[str] = ("exact_match",),
        name: str | None = None,
    ) -> None:
        self._rows, self._make = rows, make
        self.metrics, self.name = tuple(metrics), name

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> Sample: ...

    @overload
    def __getitem__(self, index: slice) -> Rows: ...

    def __getitem__(self, index: int | slice) -> Sample | Rows:
        if isinstance(index, slice):
            part = Subset(self._rows, range(*index.indices(len(self))))
            return Rows(part, self._make, self.metrics, self.name)
        return self._make(self._rows[range(len(self))[index]])


class RowStream(Iterable[Sample]):
    """The samples of a table that is read row by row."""

    def __init__(
        self,
        rows: Iterable[Row],
        make: Callable[[Row], Sample],
        metrics: Iterable[str] = ("exact_match",),
        name: str | None = None,
    ) -> None:
        self._rows, self._make = rows, make
        self.metrics, self.name = tuple(metrics), name

    def __iter__(self) -> Iterator[Sample]:
        return map(self._make, self._rows)

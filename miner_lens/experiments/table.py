"""The table of trials that every experiment is read from, and its files."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor

from miner_lens import files
from miner_lens.models.identity import ModelIdentity
from miner_lens.models.result import Result

if TYPE_CHECKING:
    import pandas as pd

PARQUET = ".parquet"
COLUMNS = ("sample", "label", "condition", "correct", "logprob")
_KEY = b"miner_lens"


@dataclass(frozen=True, eq=False, repr=False)
class Trials(Result):
    """What became of each sample under each condition.

    Attributes:
        samples: The samples' ids, in the order of the data.
        labels: Their labels.
        conditions: The conditions' names, in the order given.
        correct: `[condition sample]`, whether greedy decoding gives the answer and stops; or what
            the metric said of the generated answer, from 0 to 1.
        logprob: `[condition sample]`, the log-probability of the answer, in nats.
        answers: What was generated under each condition, for each sample; None where nothing was.
        identity: The model, where it is known.
    """

    filename: ClassVar[str] = "trials.safetensors"

    samples: tuple[str, ...]
    labels: tuple[str | None, ...]
    conditions: tuple[str, ...]
    correct: np.ndarray[Any, np.dtype[np.bool_ | np.float64]]
    logprob: np.ndarray[Any, np.dtype[np.float64]]
    answers: tuple[tuple[str, ...], ...] | None = None
    identity: ModelIdentity | None = None

    def to_frame(self) -> pd.DataFrame:
        """A table with one row for each trial.

        Its columns are sample, label, condition, answer (only where answers were generated),
        correct and logprob.
        """
        import pandas as pd

        table = pd.DataFrame(
            {
                "sample": self.samples * len(self.conditions),
                "label": pd.Series(self.labels * len(self.conditions), dtype="str"),
                "condition": np.repeat(np.array(self.conditions, dtype=object), len(self.samples)),
                "correct": self.correct.ravel(),
                "logprob": self.logprob.ravel(),
            }
        ).astype({"sample": "str", "condition": "str"})
        if self.answers is not None:
            given = [answer for row in self.answers for answer in row]
            table.insert(3, "answer", pd.Series(given, dtype="str"))
        return table

    @classmethod
    def from_frame(cls, table: pd.DataFrame, identity: ModelIdentity | None = None) -> Self:
        """The trials of a table such as `to_frame` makes, whatever order its rows are in.

        Raises:
            ValueError: A column is missing, or a sample was not tried just once under each
                condition.
        """
        if missing := [name for name in COLUMNS if name not in table]:
            raise ValueError(
                f"The table has no column {missing[0]!r}; a table of trials has "
                f"{', '.join(COLUMNS)}."
            )
        samples = list(table["sample"].unique())
        conditions = list(table["condition"].unique())
        rows = table.set_index(["condition", "sample"])
        if len(rows) != len(samples) * len(conditions) or rows.index.has_duplicates:
            raise ValueError(
                f"The table has {len(rows)} rows for {len(samples)} samples x {len(conditions)} "
                "conditions; each sample must be there just once under each condition."
            )
        rows = rows.loc[[(condition, one) for condition in conditions for one in samples]]
        shape = (len(conditions), len(samples))
        kind = np.bool_ if rows["correct"].dtype == bool else np.float64
        labels = rows["label"].iloc[: len(samples)]
        answers = None
        if "answer" in rows:
            given = rows["answer"].fillna("").to_numpy().reshape(shape)
            answers = tuple(tuple(map(str, row)) for row in given)
        return cls(
            tuple(map(str, samples)),
            tuple(one if isinstance(one, str) else None for one in labels),
            tuple(map(str, conditions)),
            rows["correct"].to_numpy(dtype=kind).reshape(shape),
            rows["logprob"].to_numpy(dtype=np.float64).reshape(shape),
            answers,
            identity,
        )

    def overview(self) -> pd.DataFrame:
        """Each condition's share of correct answers and mean log-probability of the answer."""
        import pandas as pd

        columns = {"correct": self.correct.mean(1), "logprob": self.logprob.mean(1)}
        return pd.DataFrame(columns, list(self.conditions)).rename_axis("condition")

    def __repr__(self) -> str:
        lines = [f"Trials({len(self.samples)} samples x {len(self.conditions)} conditions)"]
        for name, correct, scored in zip(self.conditions, self.correct, self.logprob, strict=True):
            lines.append(f"  {name}: {correct.mean():.3f} correct, logprob {scored.mean():.3f}")
        return "\n".join(lines)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write to a file that `load` reads.

        A name that ends in `.parquet` makes a Parquet file of `to_frame`, which pandas, polars,
        DuckDB and R read too, with the model's identity among its metadata; any other name a
        safetensors file.

        Raises:
            ImportError: The name ends in `.parquet`, and pyarrow is missing.
            OSError: The file cannot be written.
        """
        if Path(path).suffix != PARQUET:
            super().save(path)
            return
        arrow, parquet = _pyarrow()
        identity = None if self.identity is None else self.identity.to_dict()
        header = {"kind": type(self).__name__, "format": files.FORMAT, "identity": identity}
        table = arrow.Table.from_pandas(self.to_frame(), preserve_index=False)
        about = {**(table.schema.metadata or {}), _KEY: json.dumps(header).encode()}
        with files.whole(path) as temporary:
            parquet.write_table(table.replace_schema_metadata(about), temporary)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read what `save` wrote, of either format, or a Parquet file with the same columns.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: The file is damaged, holds something else or is of a newer version.
            ImportError: It is a Parquet file, and pyarrow is missing.
        """
        path = Path(path)
        if path.suffix != PARQUET:
            return super().load(path)
        if not path.is_file():
            raise FileNotFoundError(f"There is no file {path}.")
        arrow, parquet = _pyarrow()
        try:
            table = parquet.read_table(path)
        except (arrow.ArrowInvalid, OSError) as error:
            raise ValueError(f"{path} is not a complete Parquet file ({error}).") from error
        header = json.loads((table.schema.metadata or {}).get(_KEY, b"{}"))
        files.check_format(path, header.get("format", 0))
        known = header.get("identity")
        identity = None if known is None else ModelIdentity.from_dict(known)
        return cls.from_frame(table.to_pandas(), identity)

    def to_parts(self) -> tuple[dict[str, Tensor | None], dict[str, Any]]:
        """What a file of the trials holds."""
        tensors: dict[str, Tensor | None] = {
            "correct": torch.from_numpy(self.correct),
            "logprob": torch.from_numpy(self.logprob),
        }
        names = ("samples", "labels", "conditions", "answers")
        return tensors, {name: getattr(self, name) for name in names}

    @classmethod
    def from_parts(
        cls,
        tensors: Mapping[str, Tensor],
        metadata: Mapping[str, Any],
        identity: ModelIdentity | None,
    ) -> Self:
        """The trials that a file holds."""
        answers = metadata["answers"]
        return cls(
            tuple(metadata["samples"]),
            tuple(metadata["labels"]),
            tuple(metadata["conditions"]),
            tensors["correct"].numpy(),
            tensors["logprob"].numpy(),
            None if answers is None else tuple(map(tuple, answers)),
            identity,
        )


def _pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise ImportError(
            "Parquet files need pyarrow: pip install pyarrow. Or name a .safetensors file."
        ) from error
    return pyarrow, parquet

"""What the results of experiments have in common: one tidy table."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

from miner_lens import files
from miner_lens.notebook import as_html

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure


@dataclass(frozen=True, eq=False, repr=False)
class Finding(ABC):
    """What an experiment has found: a tidy table, a sentence about it and a figure of it.

    Attributes:
        frame: The table; its docstring says what the columns are.
        info: What else to keep with it, as JSON can hold it.
    """

    frame: pd.DataFrame
    info: Mapping[str, Any] = field(default_factory=dict)

    @property
    @abstractmethod
    def summary(self) -> str:
        """What the table says, in a computed sentence."""

    @abstractmethod
    def figure(self) -> Figure:
        """The table, drawn with matplotlib."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self.frame)} rows)\n{self.summary}"

    def _repr_html_(self) -> str:
        return as_html(self.summary, self.frame)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write to a file that `load` reads; `frame` writes itself to any table format.

        Raises:
            OSError: The file cannot be written.
        """
        table = {str(name): column.tolist() for name, column in self.frame.items()}
        kinds = {str(name): str(kind) for name, kind in self.frame.dtypes.items()}
        content = {"columns": table, "dtypes": kinds, "info": dict(self.info)}
        files.write(path, type(self).__name__, {}, content)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: The file is damaged or holds something else.
        """
        import pandas as pd

        _, content = files.read(path, cls.__name__)
        frame = pd.DataFrame(content["columns"]).astype(content["dtypes"])
        return cls(frame, content["info"])

"""How notebooks show results."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd


def as_html(title: str, table: pd.DataFrame) -> str:
    """A heading and a table, as `_repr_html_` returns them.

    Args:
        title: Of one line.
        table: Shown whole, so of few rows.
    """
    shown = table.to_html(border=0, float_format="{:.4f}".format, max_rows=60)
    return f"<p><b>{escape(title)}</b></p>\n{shown}"

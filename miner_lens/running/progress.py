"""The progress bar of a run."""

from __future__ import annotations

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
)
from rich.text import Text


class Rate(ProgressColumn):
    """Samples per second."""

    def render(self, task: Task) -> Text:
        """What the column shows."""
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:.1f} samples/s")


class Bar:
    """A progress bar with samples per second and the number of skipped samples.

    Args:
        show: Whether to show it at all.
        total: How many samples there are, where that is known.
    """

    def __init__(self, show: bool, total: int | None) -> None:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            Rate(),
        )
        self._progress = Progress(*columns, disable=not show)
        self._task = self._progress.add_task("samples", total=total)

    def __enter__(self) -> Bar:
        self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.stop()

    def show(self, samples: int, skipped: int) -> None:
        """Show that so many samples are done, some of them skipped."""
        description = "samples" if not skipped else f"samples ({skipped} skipped)"
        self._progress.update(self._task, completed=samples, description=description)

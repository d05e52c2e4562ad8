"""What the subcommands share: the app, models and data sets by name, errors without tracebacks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from miner_lens import launchers

app = typer.Typer(
    help="Find modality-specific neurons in multimodal language models and switch them off.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Model = Annotated[str, typer.Argument(help="Checkpoint folder, hub id, or organism name.")]


def data_set(name: str, limit: int | None, root: Path | None = None) -> Any:
    """A data set by its name, or by its name and what is asked about: easy-vqa:text.

    With a root it is read from the folder of its name there.
    """
    import miner_lens as ml

    name, _, ask = name.partition(":")
    path = None if root is None else root / name
    return ml.datasets.load(name, limit=limit, ask=ask or None, path=path)


def asked_sets(names: Sequence[str], limit: int | None, root: Path | None = None) -> dict[str, Any]:
    """Data sets by what is asked about where that tells them apart, and else by their names."""
    asked = [one.partition(":")[2] or one for one in names]
    labels = asked if len(set(asked)) == len(asked) else names
    return {label: data_set(one, limit, root) for label, one in zip(labels, names, strict=True)}


def keep(result: Any, out: Path, name: str) -> None:
    """Write an experiment's result, its table and its figure, and say what it says."""
    if launchers.rank() > 0:  # all ranks have it
        return
    result.save(out / f"{name}.safetensors")
    result.frame.to_csv(out / f"{name}.csv", index=False)
    result.figure().savefig(out / f"{name}.png")
    typer.echo(result.summary)


def load(model: str) -> Any:
    """A model by its name or folder."""
    import miner_lens as ml

    without_progress_bars()
    with clear_errors():
        return ml.load(model)


def without_progress_bars() -> None:
    """Let transformers load silently."""
    from transformers.utils import logging

    disable: Any = logging.disable_progress_bar
    disable()


class clear_errors:  # noqa: N801 (reads as a statement)
    """Print what was wrong instead of a traceback."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        if isinstance(error, ValueError | OSError | ImportError):
            typer.secho(f"error: {error}", fg=typer.colors.RED, err=True)
            raise typer.Exit(2) from error

"""A paper's experiments, whole."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from miner_lens import launchers
from miner_lens.cli.common import app, clear_errors, load
from miner_lens.cli.experiments import PANEL

MODEL = "Qwen/Qwen2-VL-7B-Instruct"


@app.command(rich_help_panel=PANEL)
def reproduce(
    paper: Annotated[str, typer.Argument(help="miner.")],
    out: Annotated[Path, typer.Option(help="Folder for everything; continued if stopped.")],
    model: Annotated[str, typer.Option(help="Checkpoint folder, hub id, or organism.")] = MODEL,
    limit: Annotated[int | None, typer.Option(help="So many samples of each data set.")] = None,
    data_root: Annotated[
        Path | None, typer.Option(help="Folder of the data sets' folders; others: from the hub.")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Samples in one forward pass.")] = 16,
) -> None:
    """Do a paper's experiments: mine, select, switch off, tables, figures and a report."""
    import miner_lens as ml
    from miner_lens.experiments.protocol import PROTOCOLS, STAND_INS

    with clear_errors():
        if paper not in PROTOCOLS:
            raise ValueError(f"There is no protocol {paper!r}; there are {', '.join(PROTOCOLS)}.")
        protocol = PROTOCOLS[paper]
        if model in STAND_INS:
            protocol = protocol.on(model)
        results = ml.experiments.reproduce(load(model), protocol, out, limit, data_root, batch_size)
        if launchers.rank() > 0:  # all ranks have them
            return
        for result in results.values():
            if isinstance(result, ml.experiments.Finding):
                typer.echo(result.summary)
        page = ml.report(results, out / "report.html", f"{protocol.name} on {model}")
    typer.echo(f"The report is {page}.")

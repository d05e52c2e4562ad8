"""A paper's experiments, whole."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from miner_lens import launchers
from miner_lens.cli.common import app, asked_sets, clear_errors, load
from miner_lens.cli.experiments import PANEL

MODEL = "Qwen/Qwen2-VL-7B-Instruct"
# What stands in for the paper's data sets where the model is a small one that ships.
OWN_DOMAINS = {
    "shapes": ("easy-vqa", "digits"),
    "smol-vl": ("easy-vqa", "digits"),
    "smollm2": tuple(f"text-domains:{name}" for name in ("code", "prose", "arithmetic")),
    "speech": ("spoken-scenes:audio", "spoken-scenes:text"),
    "smol-audio": ("spoken-scenes:audio", "spoken-scenes:text"),
    "smol-omni": ("easy-vqa:image", "easy-vqa:audio", "easy-vqa:text"),
}

reproduce = typer.Typer(help="Go through a paper's protocol; resumable.", no_args_is_help=True)
app.add_typer(reproduce, name="reproduce", rich_help_panel=PANEL)


@reproduce.callback()
def papers() -> None:
    """Go through a paper's protocol; what was stopped goes on where it was."""


@reproduce.command()
def miner(
    out: Annotated[Path, typer.Option(help="Folder for everything; continued if stopped.")],
    model: Annotated[str, typer.Option(help="Checkpoint folder, hub id, or organism.")] = MODEL,
    limit: Annotated[int | None, typer.Option(help="So many samples of each data set.")] = None,
    data_root: Annotated[
        Path | None, typer.Option(help="Folder of the data sets' folders; others: from the hub.")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Samples in one forward pass.")] = 16,
) -> None:
    """Mine, select, switch off: MINER's tables and figures, and a report."""
    import miner_lens as ml
    from miner_lens.experiments.protocol import MINER, STAND_INS

    with clear_errors():
        protocol = MINER.on(model) if model in STAND_INS else MINER
        results = ml.experiments.reproduce(load(model), protocol, out, limit, data_root, batch_size)
        if launchers.rank() > 0:  # all ranks have them
            return
        for result in results.values():
            if isinstance(result, ml.experiments.Finding):
                typer.echo(result.summary)
        page = ml.report(results, out / "report.html", f"{protocol.name} on {model}")
    typer.echo(f"The report is {page}.")


@reproduce.command()
def mmneuron(
    out: Annotated[Path, typer.Option(help="Folder for all files; continued if it has some.")],
    model: Annotated[str, typer.Option(help="Checkpoint folder, hub id, or organism.")] = MODEL,
    data: Annotated[
        list[str] | None,
        typer.Option(help="Data sets, each a domain; by default the paper's, or an organism's."),
    ] = None,
    data_root: Annotated[
        Path | None, typer.Option(help="Folder with a folder for each; default: from the hub.")
    ] = None,
    limit: Annotated[int, typer.Option(help="So many samples of each domain are counted.")] = 200,
    tried: Annotated[int, typer.Option(help="So many others are tried.")] = 50,
    top_rate: Annotated[float, typer.Option(help="Share of a site's neurons to take.")] = 0.01,
    seeds: Annotated[int, typer.Option(help="Of the random neurons.")] = 3,
    batch_size: Annotated[int, typer.Option(help="Samples in one forward pass.")] = 8,
) -> None:
    """Domain neurons in each site, where they lie, what they cost, and the lens's entropy."""
    import miner_lens as ml

    with clear_errors():
        names = tuple(data or OWN_DOMAINS.get(model, ml.experiments.DATA_SETS))
        domains = asked_sets(names, limit + tried, data_root)
        found = ml.experiments.mmneuron(
            load(model), domains, out, tried, top_rate, seeds, batch_size
        )
        if launchers.rank() > 0:  # all ranks have it
            return
        for site, layers in found.layers.items():
            layers.frame.to_csv(out / f"layers-{site}.csv", index=False)
            layers.figure().savefig(out / f"layers-{site}.png")
        found.matrix.to_frame().to_csv(out / "matrix.csv", index=False)
        found.entropy.to_csv(out / "entropy.csv", index=False)
        for modality, rows in found.entropy.groupby("modality", sort=False):
            figure = ml.plots.curves(rows, "entropy", by="domain")
            figure.savefig(out / f"entropy-{modality}.png")
        typer.echo(found.matrix.matrix().round(3).to_string())
        typer.echo(found.summary)
        page = ml.report(found.results(), out / "report.html", f"MMNeuron on {model}")
    typer.echo(f"The report is {page}.")

"""What switching neurons off shows: experiments, domains, and a report of results."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from miner_lens.cli.common import Model, app, asked_sets, clear_errors, data_set, keep, load

PANEL = "What it shows"

# The experiments on neurons that are switched off, and which of the options each takes.
EXPERIMENTS: dict[str, tuple[str, ...]] = {
    "ablation-table": ("ratio", "strategy"),
    "ablation-values": ("ratio", "strategy"),
    "necessity": (),
    "ratio-sweep": ("strategy",),
    "selection-grid": ("ratio",),
    "specificity": ("ratio", "strategy"),
    "transfer": ("ratio", "strategy"),
}


@app.command(rich_help_panel=PANEL)
def experiment(
    name: Annotated[str, typer.Argument(help=f"One of {', '.join(EXPERIMENTS)}.")],
    model: Model,
    data: Annotated[
        list[str], typer.Argument(help="Data sets, such as easy-vqa:image easy-vqa:text.")
    ],
    out: Annotated[Path, typer.Option(help="Folder for the result, its table and its figure.")],
    scores: Annotated[
        Path | None, typer.Option(help="Scores that `mine` saved; mined anew if left out.")
    ] = None,
    mined: Annotated[int, typer.Option(help="So many samples of each data set are mined.")] = 100,
    limit: Annotated[int, typer.Option(help="So many others are tried.")] = 100,
    ratio: Annotated[float, typer.Option(help="Share of all neurons to select.")] = 0.02,
    strategy: Annotated[str, typer.Option(help="As for select.")] = "LA_MU",
    metric: Annotated[
        str, typer.Option(help="exact: the answer comes and ends; begins: it comes.")
    ] = "exact",
    batch_size: Annotated[int, typer.Option(help="Samples in one forward pass.")] = 16,
    conditions_per_batch: Annotated[
        int, typer.Option(help="So many conditions go through the model together, as rows.")
    ] = 1,
    checkpoint: Annotated[
        Path | None, typer.Option(help="Folder from which trials that were stopped continue.")
    ] = None,
) -> None:
    """Switch neurons off and measure: are they specific, necessary, and beyond chance?"""
    import miner_lens as ml

    with clear_errors():
        if name not in EXPERIMENTS:
            raise ValueError(
                f"There is no experiment {name!r}; there are {', '.join(EXPERIMENTS)}."
            )
        if name == "transfer" and scores is not None:
            raise ValueError("transfer mines each data set by itself; leave --scores out.")
        sets = asked_sets(data, mined + limit)
        bridge = load(model)
        found: Any
        if scores is None:
            each = {
                label: ml.mine(bridge, some[:mined], batch_size=batch_size)
                for label, some in sets.items()
            }
            found = each if name == "transfer" else ml.ImportanceScores.mean(each.values())
        else:
            found = ml.ImportanceScores.load(scores)
        tried = {label: some[mined:] for label, some in sets.items()}
        given = {"ratio": ratio, "strategy": strategy}
        how: dict[str, Any] = {option: given[option] for option in EXPERIMENTS[name]}
        made = getattr(ml.experiments, name.replace("-", "_"))
        how |= {
            "batch_size": batch_size,
            "metric": metric,
            "conditions_per_batch": conditions_per_batch,
            "checkpoint": checkpoint,
        }
        result = made(bridge, tried, found, **how)
        keep(result, out, name)


@app.command(rich_help_panel=PANEL)
def domains(
    model: Model,
    data: Annotated[
        list[str],
        typer.Argument(help="Data sets, each a domain, such as easy-vqa, digits or easy-vqa:text."),
    ],
    out: Annotated[Path, typer.Option(help="Folder for counts, neurons and the matrix.")],
    site: Annotated[list[str], typer.Option(help="llm, vision, audio, projector.")] = ["llm"],  # noqa: B006
    top_rate: Annotated[float, typer.Option(help="Share of a site's neurons to take.")] = 0.01,
    limit: Annotated[int, typer.Option(help="So many samples of each domain.")] = 100,
    tried: Annotated[int, typer.Option(help="Samples of each domain to try them on, or 0.")] = 0,
    by: Annotated[float, typer.Option(help="Multiply the neurons by this; 0 is off.")] = 0.0,
    batch_size: Annotated[int, typer.Option(help="Samples in one forward pass.")] = 8,
) -> None:
    """Find domain-specific neurons (MMNeuron), and try each domain without each domain's."""
    import miner_lens as ml
    from miner_lens.data.labelled import labelled

    with clear_errors():
        found = {name: data_set(name, limit + tried) for name in data}
        first = {name: some[:limit] for name, some in found.items()}
        last = {name: some[limit:] for name, some in found.items()}
        # A data set with labels of its own, such as text-domains, is several domains.
        labels = {one.label for some in found.values() for one in some}
        own = len(found) == 1 and len(labels - {None}) > 1
        counted, kept = (
            next(iter(some.values())) if own else labelled(some) for some in (first, last)
        )
        bridge = load(model)
        counts = ml.run(bridge, counted, *map(ml.DomainAnalyzer, site), batch_size=batch_size)
        selections = []
        for one in counts if isinstance(counts, tuple) else (counts,):
            one.save(out / f"counts-{one.site}.safetensors")
            selections.append(one.select(top_rate))
            for domain, neurons in selections[-1].items():
                neurons.save(out / f"neurons-{one.site}-{domain}.safetensors")
                typer.echo(f"{domain}: {neurons!r}")
        if tried:
            matrix = ml.domain_matrix(bridge, kept, *selections, by=by)
            matrix.save(out / "matrix.safetensors")
            matrix.to_frame().to_csv(out / "matrix.csv", index=False)
            typer.echo(repr(matrix))


@app.command(rich_help_panel=PANEL)
def report(
    results: Annotated[
        list[Path],
        typer.Argument(help="Files that other commands or `.save` wrote, and tables as CSV."),
    ],
    out: Annotated[Path, typer.Option(help="The page to write.")] = Path("report.html"),
    title: Annotated[str, typer.Option(help="Its heading.")] = "miner-lens report",
) -> None:
    """Write results to one HTML page that opens from disk, without a network."""
    import miner_lens as ml

    with clear_errors():
        names = [path.stem for path in results]
        twice = {name for name in names if names.count(name) > 1}
        found = {str(path) if path.stem in twice else path.stem: _result(path) for path in results}
        typer.echo(ml.report(found, out, title))


def _keep(result: Any, out: Path, name: str) -> None:
    """Write a result, its table and its figure."""
    result.save(out / f"{name}.safetensors")
    result.frame.to_csv(out / f"{name}.csv", index=False)
    result.figure().savefig(out / f"{name}.png")


def _result(path: Path) -> Any:
    """What a file holds, whichever kind of result it is."""
    import pandas as pd

    import miner_lens
    from miner_lens import experiments, files

    if ".csv" in path.suffixes:
        return pd.read_csv(path)
    kind = files.kind_of(path)
    home = next((one for one in (miner_lens, experiments) if hasattr(one, kind)), None)
    if home is None:
        raise ValueError(f"{path} holds {kind}, which this miner-lens does not know.")
    return getattr(home, kind).load(path)

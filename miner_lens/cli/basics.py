"""The method itself: a demonstration, then look at a model, mine, select, switch off."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from miner_lens import launchers
from miner_lens.cli.common import Model, app, clear_errors, load, without_progress_bars

PANEL = "The method"


@app.command(rich_help_panel=PANEL)
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("demo"),
    samples: Annotated[int, typer.Option(help="Questions in each input modality.")] = 40,
    organism: Annotated[
        str | None,
        typer.Option(
            help="smol-vl (images), smol-audio (sounds), smol-omni (both), or the small shapes and "
            "speech; default the first of them that is installed."
        ),
    ] = None,
) -> None:
    """Mine small trained models and see whether their neurons are specific, or just important."""
    from miner_lens import organisms
    from miner_lens.demo import ORGANISMS, run_demo

    without_progress_bars()
    with clear_errors():
        shown = organism or next(name for name in ORGANISMS if name in organisms.names())
        run_demo(shown, out / shown, samples)


@app.command(rich_help_panel=PANEL)
def info(model: Model) -> None:
    """Show a model's sites, layers, neurons, modalities and hook points, and what is missing."""
    from rich.console import Console
    from rich.table import Table

    from miner_lens.models.description import describe

    bridge = load(model)
    with clear_errors():
        found = describe(bridge)
    table = Table(title=f"{found.name} ({found.architecture})")
    for column in ("site", "layers", "neurons per layer", "modalities"):
        table.add_column(column)
    for site in found.sites:
        table.add_row(site.name, str(site.layers), site.per_layer, ", ".join(site.modalities))
    Console().print(table)
    typer.echo("\n".join(found.details))


@app.command(rich_help_panel=PANEL)
def mine(
    model: Model,
    out: Annotated[Path, typer.Option(help="Where to save the scores.")],
    data: Annotated[str, typer.Option(help="Data set.")] = "easy-vqa",
    split: Annotated[
        str | None, typer.Option(help="Split of the data set; default the one papers report.")
    ] = None,
    ask: Annotated[
        str | None, typer.Option(help="What is asked about: image, audio, text, both.")
    ] = None,
    path: Annotated[
        Path | None, typer.Option(help="Folder of the data set; default: from the hub.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="So many samples at most.")] = None,
    batch_size: Annotated[str, typer.Option(help="Samples in one forward pass, or auto.")] = "1",
    attention: Annotated[str, typer.Option(help="bidirectional or causal.")] = "bidirectional",
    on_error: Annotated[str, typer.Option(help="raise, or skip unusable samples.")] = "raise",
    site: Annotated[str, typer.Option(help="llm, vision, audio or projector.")] = "llm",
    metrics: Annotated[
        str, typer.Option(help="What to score; prob,mean,max never touches attention.")
    ] = "prob,mean,max,attn_k,attn_q",
    checkpoint: Annotated[
        Path | None, typer.Option(help="Folder from which a run that was stopped continues.")
    ] = None,
) -> None:
    """Score every neuron by modality and save the scores."""
    import miner_lens as ml

    with clear_errors():
        if out.is_dir():
            raise IsADirectoryError(f"{out} is a folder; name a file for the scores.")
        out.parent.mkdir(parents=True, exist_ok=True)
        samples = ml.datasets.load(data, split, limit, ask, path)
        scores = ml.mine(
            load(model),
            samples,
            attention=attention,  # type: ignore[arg-type]
            batch_size="auto" if batch_size == "auto" else int(batch_size),
            on_error=on_error,  # type: ignore[arg-type]
            site=site,
            metrics=tuple(metrics.split(",")),
            checkpoint=checkpoint,
        )
        if launchers.rank() > 0:  # all ranks have them
            return
        scores.save(out)
    typer.echo(repr(scores))


@app.command(rich_help_panel=PANEL)
def select(
    scores: Annotated[Path, typer.Argument(help="Scores that `mine` saved.")],
    out: Annotated[Path, typer.Option(help="Folder for one file per modality.")],
    ratio: Annotated[float, typer.Option(help="Share of all neurons to select.")] = 0.02,
    strategy: Annotated[
        str, typer.Option(help="LA_MU, LU_MA, adaptive, uniform, contrastive, lape or random.")
    ] = "LA_MU",
    split: Annotated[str | None, typer.Option(help="How tokens are split.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the random strategy.")] = 0,
) -> None:
    """Select modality-specific neurons from scores."""
    import miner_lens as ml

    with clear_errors():
        loaded = ml.ImportanceScores.load(scores)
        chosen = loaded.select(ratio, strategy, split=split, seed=seed)
        out.mkdir(parents=True, exist_ok=True)
        paths = {modality: out / f"neurons-{modality}.safetensors" for modality in chosen}
        if others := sorted(set(out.glob("neurons-*.safetensors")) - set(paths.values())):
            raise FileExistsError(
                f"{out} holds another selection ({others[0].name}, for one); name another folder."
            )
        for modality, neurons in chosen.items():
            neurons.save(paths[modality])
            typer.echo(f"{modality}: {neurons!r}")


@app.command(rich_help_panel=PANEL)
def ablate(
    model: Model,
    neurons: Annotated[list[Path], typer.Argument(help="Neuron files that `select` saved.")],
    question: Annotated[str, typer.Option(help="What to ask.")],
    image: Annotated[Path | None, typer.Option(help="An image to ask about.")] = None,
    value: Annotated[str, typer.Option(help="zero, min, mean or a number.")] = "zero",
    at: Annotated[str | None, typer.Option(help="Only at this modality's tokens.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Length of the answer.")] = 32,
    sound: Annotated[Path | None, typer.Option(help="A sound to ask about.")] = None,
) -> None:
    """Answer a question with and without the neurons."""
    import miner_lens as ml

    with clear_errors():
        bridge = load(model)
        chosen = {str(path): ml.NeuronSet.load(path) for path in neurons}
        content: list[dict[str, Any]] = [{"type": "text", "text": question}]
        if image is not None:
            content.insert(0, {"type": "image", "image": image})
        if sound is not None:
            content.insert(0, {"type": "audio", "audio": sound})
        messages = [{"role": "user", "content": content}]
        intact = ml.generate(bridge, messages, max_new_tokens)
        with ml.ablate(bridge, chosen, _value(value), at=at):
            ablated = ml.generate(bridge, messages, max_new_tokens)
    typer.echo(f"intact:  {intact}")
    typer.echo(f"ablated: {ablated}")


def _value(text: str) -> Any:
    try:
        return float(text)
    except ValueError:
        return text

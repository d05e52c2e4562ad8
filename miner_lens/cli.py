"""The `miner-lens` command: each subcommand is a thin layer over the API.

Nothing heavy is imported before a command runs, so that `--help` answers at once.
"""

from __future__ import annotations

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

Model = Annotated[str, typer.Argument(help="Checkpoint folder, hub id, or organism name.")]


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("demo"),
    samples: Annotated[int, typer.Option(help="Questions in each input modality.")] = 48,
    organism: Annotated[
        str | None,
        typer.Option(
            help="smol-vl (images), smol-audio (sounds), or the small shapes and speech; default "
            "the first of them that is installed."
        ),
    ] = None,
) -> None:
    """Mine small trained models and see whether their neurons are specific, or just important."""
    from miner_lens import organisms
    from miner_lens.demo import ORGANISMS, run_demo

    _without_progress_bars()
    with _clear_errors():
        shown = organism or next(name for name in ORGANISMS if name in organisms.names())
        run_demo(shown, out / shown, samples)


@app.command()
def info(model: Model) -> None:
    """Show a model's sites, layers, neurons, modalities and hook points, and what is missing."""
    from rich.console import Console
    from rich.table import Table

    from miner_lens.models.description import describe

    bridge = _load(model)
    with _clear_errors():
        found = describe(bridge)
    table = Table(title=f"{found.name} ({found.architecture})")
    for column in ("site", "layers", "neurons per layer", "modalities"):
        table.add_column(column)
    for site in found.sites:
        table.add_row(site.name, str(site.layers), str(site.neurons), ", ".join(site.modalities))
    Console().print(table)
    typer.echo("\n".join(found.details))


@app.command()
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

    with _clear_errors():
        if out.is_dir():
            raise IsADirectoryError(f"{out} is a folder; name a file for the scores.")
        out.parent.mkdir(parents=True, exist_ok=True)
        samples = ml.datasets.load(data, split, limit, ask, path)
        scores = ml.mine(
            _load(model),
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


@app.command()
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

    with _clear_errors():
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


@app.command()
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

    with _clear_errors():
        bridge = _load(model)
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


@app.command()
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

    with _clear_errors():
        found = {name: _data_set(name, limit + tried) for name in data}
        first = {name: some[:limit] for name, some in found.items()}
        last = {name: some[limit:] for name, some in found.items()}
        # A data set with labels of its own, such as text-domains, is several domains.
        labels = {one.label for some in found.values() for one in some}
        own = len(found) == 1 and len(labels - {None}) > 1
        counted, kept = (
            next(iter(some.values())) if own else labelled(some) for some in (first, last)
        )
        bridge = _load(model)
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


@app.command()
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
    batch_size: Annotated[int, typer.Option(help="Samples in one forward pass.")] = 16,
    checkpoint: Annotated[
        Path | None, typer.Option(help="Folder from which trials that were stopped continue.")
    ] = None,
) -> None:
    """Switch neurons off and measure: are they specific, necessary, and beyond chance?"""
    import miner_lens as ml

    with _clear_errors():
        if name not in EXPERIMENTS:
            raise ValueError(
                f"There is no experiment {name!r}; there are {', '.join(EXPERIMENTS)}."
            )
        if name == "transfer" and scores is not None:
            raise ValueError("transfer mines each data set by itself; leave --scores out.")
        asked = [one.partition(":")[2] or one for one in data]
        labels = asked if len(set(asked)) == len(asked) else data
        sets = {
            label: _data_set(one, mined + limit) for label, one in zip(labels, data, strict=True)
        }
        bridge = _load(model)
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
        result = made(bridge, tried, found, batch_size=batch_size, checkpoint=checkpoint, **how)
        if launchers.rank() > 0:  # all ranks have it
            return
        result.save(out / f"{name}.safetensors")
        result.frame.to_csv(out / f"{name}.csv", index=False)
        result.figure().savefig(out / f"{name}.png")
    typer.echo(result.summary)


@app.command()
def attribute(
    model: Model,
    data: Annotated[str, typer.Argument(help="A data set, such as easy-vqa or easy-vqa:both.")],
    out: Annotated[Path, typer.Option(help="Where to save the scores, for `select`.")],
    by: Annotated[
        str, typer.Option(help="gradient (first order), integrated, or contribution.")
    ] = "gradient",
    steps: Annotated[int, typer.Option(help="Points of integrated gradients at most.")] = 64,
    limit: Annotated[int, typer.Option(help="So many samples.")] = 50,
    batch_size: Annotated[int, typer.Option(help="Samples in one forward pass.")] = 8,
) -> None:
    """Score every neuron by what it does for the answer, and save the scores."""
    import miner_lens as ml

    with _clear_errors():
        if by not in ("gradient", "integrated", "contribution"):
            raise ValueError(f"--by is gradient, integrated or contribution, not {by!r}.")
        samples, bridge = _data_set(data, limit), _load(model)
        if by == "gradient":
            scores = ml.attribute(bridge, samples, batch_size=batch_size)
        elif by == "integrated":
            scores = ml.integrated_gradients(bridge, samples, steps, batch_size=batch_size)
        else:
            scores = ml.run(bridge, samples, ml.ContributionAnalyzer(data), batch_size=batch_size)
        scores.save(out)
        typer.echo(repr(scores))
        for modality, reached in scores.info.get("completeness", {}).items():
            typer.echo(
                f"{modality}: {reached['sum']:.4f} of {reached['difference']:.4f} nats "
                f"(gap {reached['gap']:.2%})"
            )


@app.command()
def kinds(
    model: Model,
    data: Annotated[str, typer.Argument(help="A data set, such as easy-vqa or easy-vqa:both.")],
    out: Annotated[Path, typer.Option(help="Folder for the shares and the neurons.")],
    medium: Annotated[str, typer.Option(help="image, video or audio.")] = "image",
    limit: Annotated[int, typer.Option(help="So many samples.")] = 200,
    batch_size: Annotated[int, typer.Option(help="Samples in one forward pass.")] = 8,
) -> None:
    """Sort neurons into those of a medium, of text and of both (Xu et al. 2025)."""
    import miner_lens as ml

    with _clear_errors():
        samples, analyzer = _data_set(data, limit), ml.KindAnalyzer(medium)
        found = ml.run(_load(model), samples, analyzer, batch_size=batch_size)
        found.save(out / "kinds.safetensors")
        for kind, neurons in found.select().items():
            neurons.save(out / f"neurons-{kind}.safetensors")
        typer.echo(repr(found))


@app.command()
def convergence(
    model: Model,
    data: Annotated[str, typer.Argument(help="A data set, such as easy-vqa.")],
    out: Annotated[Path, typer.Option(help="Folder for states, curves and figures.")],
    limit: Annotated[int, typer.Option(help="So many samples.")] = 100,
    shuffles: Annotated[int, typer.Option(help="Of the null.")] = 20,
    layer: Annotated[int | None, typer.Option(help="Of which to draw a t-SNE figure.")] = None,
    batch_size: Annotated[int, typer.Option(help="Samples in one forward pass.")] = 8,
) -> None:
    """Measure whether modalities converge: CKA, distance, separability, dimension, by layer."""
    import miner_lens as ml

    with _clear_errors():
        samples, analyzer = _data_set(data, limit), ml.ConvergenceAnalyzer(samples=limit)
        states = ml.run(_load(model), samples, analyzer, batch_size=batch_size)
        states.save(out / "states.safetensors")
        curves = states.curves(shuffles=shuffles)
        curves.to_csv(out / "curves.csv", index=False)
        curves["pair"] = (curves["modality"] + " " + curves["other"]).str.strip()
        for measure in curves["measure"].unique():
            ml.plots.curves(curves, measure, by="pair").savefig(out / f"{measure}.png")
        if layer is not None:
            ml.plots.scatter(states.embed(layer)).savefig(out / f"layer-{layer}.png")
        typer.echo(repr(states))
        wide = curves.pivot_table("mean", ["measure", "pair"], "layer", sort=False)
        typer.echo(wide.round(3).to_string())


@app.command()
def flow(
    model: Model,
    data: Annotated[str, typer.Argument(help="A data set, such as easy-vqa.")],
    out: Annotated[Path, typer.Option(help="Folder for the trials, curves and figures.")],
    modality: Annotated[list[str], typer.Option(help="Whose tokens are cut off.")] = ["image"],  # noqa: B006
    window: Annotated[int, typer.Option(help="So many layers are cut together.")] = 3,
    limit: Annotated[int, typer.Option(help="So many samples.")] = 50,
    batch_size: Annotated[int, typer.Option(help="Samples in one forward pass.")] = 16,
) -> None:
    """Cut attention from the last token to a modality, by windows of layers."""
    import miner_lens as ml

    with _clear_errors():
        samples = _data_set(data, limit)
        found = ml.information_flow(_load(model), samples, modality, window, batch_size)
        found.save(out / "flow.safetensors")
        curves = found.curves()
        curves.to_csv(out / "curves.csv", index=False)
        for measure in curves["measure"].unique():
            ml.plots.curves(curves, measure).savefig(out / f"{measure}.png")
        typer.echo(repr(found))


@app.command()
def patch(
    model: Model,
    data: Annotated[str, typer.Argument(help="A data set, such as easy-vqa.")],
    out: Annotated[Path, typer.Option(help="Folder for what patching restores.")],
    neurons: Annotated[
        list[Path] | None, typer.Option(help="Neuron files, to patch these and not layers.")
    ] = None,
    limit: Annotated[int, typer.Option(help="So many samples, to find pairs among.")] = 300,
    pairs: Annotated[int, typer.Option(help="So many pairs at most.")] = 20,
) -> None:
    """Put activations of a prompt into its counterfactual, and see what that restores."""
    import miner_lens as ml

    with _clear_errors():
        found = ml.counterfactuals(_data_set(data, limit), pairs)
        sets = {path.stem: ml.NeuronSet.load(path) for path in neurons or ()}
        patching = ml.activation_patching(_load(model), found, sets)
        patching.save(out / "patching.safetensors")
        curves = patching.curves()
        curves.to_csv(out / "curves.csv", index=False)
        if not sets:
            figure = ml.plots.curves(curves, "share of the logit difference")
            figure.savefig(out / "restored.png")
        typer.echo(repr(patching))


@app.command()
def lens(
    model: Model,
    data: Annotated[str, typer.Argument(help="A data set, such as easy-vqa or easy-vqa:both.")],
    out: Annotated[Path, typer.Option(help="Folder for what it shows.")],
    limit: Annotated[int, typer.Option(help="So many samples.")] = 50,
    batch_size: Annotated[int, typer.Option(help="Samples in one forward pass.")] = 8,
) -> None:
    """Look through the logit lens: entropy, answer and agreement by layer and modality."""
    import miner_lens as ml

    with _clear_errors():
        samples = _data_set(data, limit)
        seen = ml.run(_load(model), samples, ml.LogitLensAnalyzer(), batch_size=batch_size)
        seen.save(out / "lens.safetensors")
        curves = seen.curves()
        curves.to_csv(out / "curves.csv", index=False)
        for measure in curves["measure"].unique():
            ml.plots.curves(curves, measure).savefig(out / f"{measure}.png")
        typer.echo(repr(seen))
        for modality, found in seen.stages().items():
            ends = [f"{layer} [{low}, {high}]" for layer, low, high in zip(*found, strict=True)]
            typer.echo(f"{modality}: entropy changes course at {', '.join(ends) or 'no layer'}")


@app.command()
def neuron(
    model: Model,
    layer: Annotated[int, typer.Argument(help="The neuron's layer, from 0.")],
    index: Annotated[int, typer.Argument(help="Its place in the layer, from 0.")],
    data: Annotated[str, typer.Option(help="A data set, such as easy-vqa:both.")] = "easy-vqa",
    out: Annotated[Path | None, typer.Option(help="Where to save the card, for `report`.")] = None,
    scores: Annotated[
        list[Path] | None, typer.Option(help="Scores that are there already, to be shown.")
    ] = None,
    limit: Annotated[int, typer.Option(help="So many samples.")] = 50,
    k: Annotated[int, typer.Option(help="So many samples, tokens and neighbours.")] = 6,
    batch_size: Annotated[int, typer.Option(help="Samples in one forward pass.")] = 8,
) -> None:
    """Show what is known of one neuron: scores, top samples, vocabulary, neighbours, its cost."""
    import miner_lens as ml

    with _clear_errors():
        known = [ml.ImportanceScores.load(path) for path in scores or ()]
        samples = _data_set(data, limit)
        card = ml.card(_load(model), samples, layer, index, known, k=k, batch_size=batch_size)
        if out is not None:
            card.save(out)
        typer.echo(card.summary)
        typer.echo(card.frame.to_string(index=False))
        for place, (word, value) in enumerate(card.promotes):
            other, less = card.suppresses[place]
            typer.echo(f"promotes {word!r} {value:+.2f}   suppresses {other!r} {less:+.2f}")
        for one in card.moments:
            typer.echo(f"{one.sample}: {one.value:.3f} at {one.tokens[one.peak]!r} ({one.peak})")


@app.command()
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

    with _clear_errors():
        names = [path.stem for path in results]
        twice = {name for name in names if names.count(name) > 1}
        found = {str(path) if path.stem in twice else path.stem: _result(path) for path in results}
        typer.echo(ml.report(found, out, title))


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


def _data_set(name: str, limit: int | None) -> Any:
    """A data set by its name, or by its name and what is asked about: easy-vqa:text."""
    import miner_lens as ml

    name, _, ask = name.partition(":")
    return ml.datasets.load(name, limit=limit, ask=ask or None)


def _value(text: str) -> Any:
    try:
        return float(text)
    except ValueError:
        return text


def _load(model: str) -> Any:
    import miner_lens as ml

    _without_progress_bars()
    with _clear_errors():
        return ml.load(model)


def _without_progress_bars() -> None:
    from transformers.utils import logging

    disable: Any = logging.disable_progress_bar
    disable()


class _clear_errors:  # noqa: N801 (reads as a statement)
    """Print what was wrong instead of a traceback."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        if isinstance(error, ValueError | OSError | ImportError):
            typer.secho(f"error: {error}", fg=typer.colors.RED, err=True)
            raise typer.Exit(2) from error

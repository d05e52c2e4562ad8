"""What is inside a model: what neurons do for the answer, and where it comes from."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from miner_lens.cli.common import Model, app, asked_sets, clear_errors, data_set, load

PANEL = "Inside the model"


@app.command(rich_help_panel=PANEL)
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

    with clear_errors():
        if by not in ("gradient", "integrated", "contribution"):
            raise ValueError(f"--by is gradient, integrated or contribution, not {by!r}.")
        samples, bridge = data_set(data, limit), load(model)
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


@app.command(rich_help_panel=PANEL)
def compare(
    model: Model,
    data: Annotated[
        list[str], typer.Argument(help="Data sets, such as easy-vqa:image easy-vqa:text.")
    ],
    out: Annotated[Path, typer.Option(help="Folder for the tables and the figure.")],
    mined: Annotated[int, typer.Option(help="So many samples of each data set are mined.")] = 50,
    limit: Annotated[int, typer.Option(help="So many others are tried.")] = 50,
    ratio: Annotated[float, typer.Option(help="Share of all neurons to select.")] = 0.02,
    batch_size: Annotated[int, typer.Option(help="Samples in one forward pass.")] = 8,
    checkpoint: Annotated[
        Path | None, typer.Option(help="Folder from which trials that were stopped continue.")
    ] = None,
) -> None:
    """Hold MINER's five metrics against attribution: rankings, effects, specificity."""
    from itertools import chain

    import miner_lens as ml

    with clear_errors():
        sets, bridge = asked_sets(data, mined + limit), load(model)
        first = list(chain.from_iterable(some[:mined] for some in sets.values()))
        scores, attribution = ml.run(
            bridge, first, ml.ImportanceAnalyzer(), ml.AttributionAnalyzer(), batch_size=batch_size
        )
        tried = {label: some[mined:] for label, some in sets.items()}
        found = ml.experiments.metric_comparison(
            bridge,
            tried,
            scores,
            attribution,
            ratio,
            batch_size=batch_size,
            checkpoint=checkpoint,
        )
        found.save(out / "comparison.safetensors")
        found.frame.to_csv(out / "comparison.csv", index=False)
        for name in ("agreement", "predictions", "specificity"):
            getattr(found, name).to_csv(out / f"{name}.csv", index=False)
            typer.echo(getattr(found, name).round(3).to_string(index=False))
        found.figure().savefig(out / "comparison.png")
        typer.echo(found.summary)


@app.command(rich_help_panel=PANEL)
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

    with clear_errors():
        samples, analyzer = data_set(data, limit), ml.KindAnalyzer(medium)
        found = ml.run(load(model), samples, analyzer, batch_size=batch_size)
        found.save(out / "kinds.safetensors")
        for kind, neurons in found.select().items():
            neurons.save(out / f"neurons-{kind}.safetensors")
        typer.echo(repr(found))


@app.command(rich_help_panel=PANEL)
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

    with clear_errors():
        samples, analyzer = data_set(data, limit), ml.ConvergenceAnalyzer(samples=limit)
        states = ml.run(load(model), samples, analyzer, batch_size=batch_size)
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


@app.command(rich_help_panel=PANEL)
def reach(
    model: Model,
    data: Annotated[str, typer.Argument(help="A data set, such as easy-vqa.")],
    out: Annotated[Path, typer.Option(help="Folder for the measures, curves and figures.")],
    limit: Annotated[int, typer.Option(help="So many samples.")] = 100,
    shuffles: Annotated[int, typer.Option(help="Of the null.")] = 20,
    batch_size: Annotated[int, typer.Option(help="Samples in one forward pass.")] = 8,
) -> None:
    """Measure semantic probing and semantic telomeres, layer by layer, beside a null."""
    import miner_lens as ml

    with clear_errors():
        samples, analyzer = data_set(data, limit), ml.SemanticReachAnalyzer(shuffles=shuffles)
        found = ml.run(load(model), samples, analyzer, batch_size=batch_size)
        _show_curves(found, out, "reach", "curves")


@app.command(rich_help_panel=PANEL)
def flow(
    model: Model,
    data: Annotated[str, typer.Argument(help="A data set, such as easy-vqa.")],
    out: Annotated[Path, typer.Option(help="Folder for the trials, curves and figures.")],
    modality: Annotated[list[str], typer.Option(help="Whose tokens are cut off.")] = ["image"],  # noqa: B006
    window: Annotated[int, typer.Option(help="So many layers are cut together.")] = 3,
    neurons: Annotated[
        list[Path] | None, typer.Option(help="Neuron files; off while it is measured.")
    ] = None,
    limit: Annotated[int, typer.Option(help="So many samples.")] = 50,
    batch_size: Annotated[int, typer.Option(help="Samples in one forward pass.")] = 16,
) -> None:
    """Cut attention from the last token to a modality, and hold its gradient beside that."""
    from contextlib import nullcontext

    import miner_lens as ml

    with clear_errors():
        samples, bridge = data_set(data, limit), load(model)
        off = {str(path): ml.NeuronSet.load(path) for path in neurons or ()}
        with ml.ablate(bridge, off) if off else nullcontext():
            cut = ml.information_flow(bridge, samples, modality, window, batch_size)
            analyzer = ml.AttentionFlowAnalyzer()
            paid = ml.run(bridge, samples, analyzer, batch_size=batch_size)
        for name, found in (("flow", cut), ("attention", paid)):
            _show_curves(found, out, name, name, f"{name}-")


@app.command(rich_help_panel=PANEL)
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

    with clear_errors():
        found = ml.counterfactuals(data_set(data, limit), pairs)
        sets = {path.stem: ml.NeuronSet.load(path) for path in neurons or ()}
        patching = ml.activation_patching(load(model), found, sets)
        patching.save(out / "patching.safetensors")
        curves = patching.curves()
        curves.to_csv(out / "curves.csv", index=False)
        if not sets:
            figure = ml.plots.curves(curves, "share of the logit difference")
            figure.savefig(out / "restored.png")
        typer.echo(repr(patching))


@app.command(rich_help_panel=PANEL)
def lens(
    model: Model,
    data: Annotated[str, typer.Argument(help="A data set, such as easy-vqa or easy-vqa:both.")],
    out: Annotated[Path, typer.Option(help="Folder for what it shows.")],
    tuned: Annotated[
        Path | None, typer.Option(help="A lens that `tune-lens` saved; else the plain one.")
    ] = None,
    limit: Annotated[int, typer.Option(help="So many samples.")] = 50,
    batch_size: Annotated[int, typer.Option(help="Samples in one forward pass.")] = 8,
) -> None:
    """Look through the logit lens: entropy, answer and agreement by layer and modality."""
    import miner_lens as ml

    with clear_errors():
        samples = data_set(data, limit)
        analyzer = ml.LogitLensAnalyzer(None if tuned is None else ml.TunedLens.load(tuned))
        seen = ml.run(load(model), samples, analyzer, batch_size=batch_size)
        _show_curves(seen, out, "lens", "curves")
        for modality, found in seen.stages().items():
            ends = [f"{layer} [{low}, {high}]" for layer, low, high in zip(*found, strict=True)]
            typer.echo(f"{modality}: entropy changes course at {', '.join(ends) or 'no layer'}")


@app.command(rich_help_panel=PANEL)
def tune_lens(
    model: Model,
    data: Annotated[str, typer.Argument(help="A data set, such as easy-vqa:both.")],
    out: Annotated[Path, typer.Option(help="Folder for the lens and what it is worth.")],
    limit: Annotated[int, typer.Option(help="So many samples to fit it to.")] = 200,
    tried: Annotated[int, typer.Option(help="So many others to try it on.")] = 50,
    ridge: Annotated[float, typer.Option(help="How strongly it is held to the plain lens.")] = 0.01,
    batch_size: Annotated[int, typer.Option(help="Samples in one forward pass.")] = 8,
) -> None:
    """Fit a tuned lens, and hold it and the plain one against the last layer, on other data."""
    import miner_lens as ml

    with clear_errors():
        samples, bridge = data_set(data, limit + tried), load(model)
        analyzer = ml.TunedLensAnalyzer(ridge)
        tuned = ml.run(bridge, samples[:limit], analyzer, batch_size=batch_size)
        tuned.save(out / "lens.safetensors")
        typer.echo(repr(tuned))
        test = ml.LensDivergenceAnalyzer(tuned)
        found = ml.run(bridge, samples[limit:], test, batch_size=batch_size)
        found.save(out / "divergence.safetensors")
        curves = found.curves()
        curves.to_csv(out / "curves.csv", index=False)
        curves["line"] = curves["modality"] + ", " + curves["measure"]
        table = curves.drop(columns="measure")
        ml.plots.curves(table, "KL to the last layer (nats)", by="line").savefig(out / "curves.png")
        typer.echo(repr(found))


@app.command(rich_help_panel=PANEL)
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

    with clear_errors():
        known = [ml.ImportanceScores.load(path) for path in scores or ()]
        samples = data_set(data, limit)
        card = ml.card(load(model), samples, layer, index, known, k=k, batch_size=batch_size)
        if out is not None:
            card.save(out)
        typer.echo(card.summary)
        typer.echo(card.frame.to_string(index=False))
        for place, (word, value) in enumerate(card.promotes):
            other, less = card.suppresses[place]
            typer.echo(f"promotes {word!r} {value:+.2f}   suppresses {other!r} {less:+.2f}")
        for one in card.moments:
            typer.echo(f"{one.sample}: {one.value:.3f} at {one.tokens[one.peak]!r} ({one.peak})")


def _show_curves(found: Any, out: Path, name: str, table: str, prefix: str = "") -> None:
    """Save a result, its curves, and a figure of each measure; print it."""
    import miner_lens as ml

    found.save(out / f"{name}.safetensors")
    curves = found.curves()
    curves.to_csv(out / f"{table}.csv", index=False)
    for measure in curves["measure"].unique():
        ml.plots.curves(curves, measure).savefig(out / f"{prefix}{measure}.png")
    typer.echo(repr(found))

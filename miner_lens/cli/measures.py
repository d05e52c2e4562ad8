"""What switches nothing off: answers, selections and scores, and whether they can be trusted."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Annotated

import typer

from miner_lens.cli.common import Model, app, asked_sets, clear_errors, data_set, keep, load
from miner_lens.cli.experiments import PANEL

Out = Annotated[Path, typer.Option(help="Folder for the result, its table and its figure.")]
Data = Annotated[str, typer.Argument(help="A data set, such as easy-vqa or easy-vqa:both.")]
Ratio = Annotated[float, typer.Option(help="Share of all neurons to select.")]
Strategy = Annotated[str, typer.Option(help="As for select.")]
Batch = Annotated[int, typer.Option(help="Samples in one forward pass.")]


@app.command(rich_help_panel=PANEL)
def evaluate(
    model: Model,
    data: Annotated[
        list[str], typer.Argument(help="Data sets, such as easy-vqa:image easy-vqa:text.")
    ],
    out: Out,
    metric: Annotated[
        list[str] | None, typer.Option(help="Names of metrics; default those of each data set.")
    ] = None,
    neurons: Annotated[
        list[Path] | None, typer.Option(help="Neuron files; off while it answers.")
    ] = None,
    limit: Annotated[int, typer.Option(help="So many samples of each data set.")] = 100,
    data_root: Annotated[
        Path | None, typer.Option(help="Folder with a folder for each; default: from the hub.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Length of an answer.")] = 128,
    batch_size: Batch = 16,
) -> None:
    """Ask every question and measure the answers, by each data set's metrics or by others."""
    from contextlib import nullcontext

    import miner_lens as ml

    with clear_errors():
        asked, bridge = asked_sets(data, limit, data_root), load(model)
        off = {str(path): ml.NeuronSet.load(path) for path in neurons or ()}
        with ml.ablate(bridge, off) if off else nullcontext():
            found = ml.evaluate(bridge, asked, metric or None, batch_size, max_new_tokens)
        keep(found, out, "evaluation")


@app.command(rich_help_panel=PANEL)
def attention(
    model: Model,
    data: Data,
    out: Out,
    ratio: Ratio = 0.02,
    strategy: Strategy = "LA_MU",
    limit: Annotated[int, typer.Option(help="So many samples.")] = 50,
    batch_size: Batch = 8,
) -> None:
    """See whether attn_k and attn_q add anything to the mean, and how much they could."""
    import miner_lens as ml

    with clear_errors():
        samples = data_set(data, limit)
        found = ml.experiments.attention_effect(
            load(model), samples, ratio=ratio, strategy=strategy, batch_size=batch_size
        )
        keep(found, out, "attention-effect")


@app.command(rich_help_panel=PANEL)
def layers(
    scores: Annotated[Path, typer.Argument(help="Scores that `mine` saved.")],
    out: Out,
    ratio: Ratio = 0.02,
    strategy: Strategy = "LA_MU",
) -> None:
    """Show in which layers selected neurons lie, and which of them modalities share."""
    import miner_lens as ml

    with clear_errors():
        chosen = ml.ImportanceScores.load(scores).select(ratio, strategy)
        keep(ml.experiments.layer_distribution(chosen), out, "layers")
        keep(ml.experiments.overlap(chosen), out, "overlap")


@app.command(rich_help_panel=PANEL)
def stability(
    model: Model,
    data: Annotated[
        list[str], typer.Argument(help="A data set, or several, such as easy-vqa digits.")
    ],
    out: Out,
    ratio: Ratio = 0.02,
    strategy: Strategy = "LA_MU",
    limit: Annotated[int, typer.Option(help="So many samples of each data set.")] = 100,
    parts: Annotated[int, typer.Option(help="So many parts of each are mined apart.")] = 10,
    repeats: Annotated[int, typer.Option(help="So many random halves of the parts.")] = 20,
    batch_size: Batch = 8,
) -> None:
    """See whether other samples, or another data set, would have given the same neurons."""
    import miner_lens as ml

    with clear_errors():
        sets, bridge = asked_sets(data, limit), load(model)
        for samples in sets.values():
            if not 2 <= parts <= len(samples):
                raise ValueError(
                    f"{len(samples)} samples make from 2 to as many parts, not {parts}."
                )
        mined = {}
        for name, samples in sets.items():
            ends = [len(samples) * n // parts for n in range(parts + 1)]
            mined[name] = [
                ml.mine(bridge, samples[start:end], batch_size=batch_size, progress=False)
                for start, end in pairwise(ends)
            ]
        several = mined if len(mined) > 1 else next(iter(mined.values()))
        found = ml.experiments.stability(several, ratio, strategy, repeats=repeats)
        keep(found, out, "stability")


@app.command(rich_help_panel=PANEL)
def recovery(
    out: Out,
    case: Annotated[
        list[str] | None, typer.Option(help="What was planted; default every case.")
    ] = None,
    seeds: Annotated[int, typer.Option(help="So many models of each case.")] = 3,
    batch_size: Batch = 16,
) -> None:
    """Try every metric and strategy on models whose neurons are known, as they were planted."""
    import miner_lens as ml
    from miner_lens.organisms.planting import CASES

    with clear_errors():
        plantings = [ml.organisms.planted(one, n) for one in case or CASES for n in range(seeds)]
        keep(ml.experiments.recovery(plantings, batch_size=batch_size), out, "recovery")

"""Parts of an organism's page: what is switched off, and what that does."""

from __future__ import annotations

from typing import Any

import pandas as pd

import miner_lens as ml
from benchmarks.lab import BATCH, RATIO, Lab, by_accent, costs, markdown, spans
from miner_lens.experiments.specificity import specificity_plan

PUBLISHED_CONTRIBUTION = (
    "Contribution, as published, is read where the answer is predicted, so it is the same for all "
    "modalities of a prompt and selects hardly more than one set: its index can only be near 0."
)


def controls(lab: Lab) -> str:
    """All MSNs and each modality's, beside their controls."""
    asked = lab.asked("controls") | lab.mixed
    found = ml.experiments.ablation_table(
        lab.model, asked, lab.scores, RATIO, **lab.options("controls")
    )
    return f"{found.summary}\n\n{costs(found.frame, ['off', 'kind', 'neurons'])}"


def ratios(lab: Lab) -> str:
    """What is lost by how many neurons."""
    found = ml.experiments.ratio_sweep(
        lab.model, lab.asked("ratios"), lab.scores, seeds=[0], **lab.options("ratios")
    )
    shown = found.frame[found.frame["off"].isin(["all", "random"])]
    drawn = lab.picture(found.figure(), "ratios")
    return f"{found.summary}\n\n{drawn}\n\n{costs(shown, ['ratio', 'off', 'neurons'])}"


def specific(lab: Lab) -> str:
    """Which selection is most specific, at equal size."""
    selections: dict[str, tuple[ml.ImportanceScores, str]] = {
        f"MINER, {name}": (lab.scores, name)
        for name in ("LA_MU", "adaptive", "contrastive", "lape")
    }
    selections["attribution, LA_MU"] = (lab.attribution, "LA_MU")
    selections["attribution, contrastive"] = (lab.attribution, "contrastive")
    selections["contribution, LA_MU"] = (lab.contribution, "LA_MU")
    plans = {
        called: specificity_plan(scores, RATIO, strategy, seeds=[0])
        for called, (scores, strategy) in selections.items()
    }
    table, plans = lab.together("specific", plans, lab.asked("specific"))
    indices, matrices = [], []
    for called, plan in plans.items():
        found = ml.experiments.read_specificity(table, plan)
        own = found.frame["off"].isin(lab.subject.inputs)
        sizes = found.frame.loc[own, "neurons"]
        size = " to ".join(str(n) for n in sorted({sizes.min(), sizes.max()}))
        about = {"selection": called, "neurons each": size}
        indices.append(
            spans(found.index.drop(columns="questions"), "index", "index", 2).assign(**about)
        )
        lost = found.frame[(found.frame["measure"] == "logprob") & (found.frame["off"] != "")]
        lost = spans(lost[["off", "label", "cost", "low", "high"]], "cost", "cost")
        wide = lost.pivot_table("cost", "off", "label", "first", sort=False)
        matrices.append(wide.reset_index().assign(selection=called))
    heads = ["selection", "neurons each", "measure", "own", "other", "index"]
    costs_of = pd.concat(matrices)[["selection", "off", *lab.subject.inputs]]
    costs_of.columns = [*heads[:1], "off", *(f"asked about the {a}" for a in lab.subject.inputs)]
    return (
        f"{markdown(pd.concat(indices)[heads])}\n\n{PUBLISHED_CONTRIBUTION}\n\nIn nats:\n\n"
        f"{markdown(costs_of)}"
    )


def compared(lab: Lab) -> str:
    """MINER's metrics, each by itself, held against attribution."""
    found = ml.experiments.metric_comparison(
        lab.model,
        lab.asked("compared"),
        lab.scores,
        lab.attribution,
        RATIO,
        **lab.options("compared"),
    )
    drawn = lab.picture(found.figure(), "compared")
    index = spans(found.specificity, "index", "index", 2)
    tables = [
        ("Rankings of all neurons, and the K highest", found.agreement),
        ("Costs, in nats, as attribution predicts them and as measured", found.predictions),
        ("Specificity, off everywhere", index),
    ]
    said = [f"{title}:\n\n{markdown(table)}" for title, table in tables]
    return "\n\n".join([found.summary, drawn, *said])


def grid(lab: Lab) -> str:
    """Metrics and strategies."""
    found = ml.experiments.selection_grid(
        lab.model, lab.asked("grid"), lab.scores, RATIO, **lab.options("grid")
    )
    return f"{found.summary}\n\n{lab.picture(found.figure(), 'grid')}"


def values(lab: Lab) -> str:
    """What is written in place of the activation."""
    found = ml.experiments.ablation_values(
        lab.model, lab.asked("values"), lab.scores, ratio=RATIO, seeds=[0], **lab.options("values")
    )
    return f"{found.summary}\n\n{costs(found.frame, ['written', 'off', 'neurons'])}"


def needed(lab: Lab) -> str:
    """Deletion and insertion curves."""
    found = ml.experiments.necessity(
        lab.model,
        lab.asked("needed"),
        lab.scores,
        lab.subject.inputs,
        seeds=[0],
        **lab.options("needed"),
    )
    return f"{found.summary}\n\n{lab.picture(found.figure(), 'necessity')}"


def transferred(lab: Lab) -> str:
    """Mined on one data set, off on another."""
    mined, tried = lab.mined_count, lab.questions("transfer")
    every = {
        name: ml.datasets.load(name, limit=mined + lab.tried_count, ask=ask)
        for name, ask in lab.subject.sets
    } or by_accent()
    scores = {
        name: ml.mine(lab.model, some[:mined], batch_size=BATCH) for name, some in every.items()
    }
    data = {name: some[mined:][:tried] for name, some in every.items()}
    parts = []
    for modality in (None, lab.subject.inputs[0]):
        found = ml.experiments.transfer(
            lab.model,
            data,
            scores,
            modality,
            RATIO,
            seeds=[0],
            **lab.options(f"transfer-{modality}"),
        )
        whose = "All MSNs" if modality is None else f"The {modality} MSNs"
        parts.append(f"{whose}. {found.summary}\n\n{costs(found.frame, ['mined', 'neurons'])}")
    return "\n\n".join(parts)


def selected(lab: Lab) -> str:
    """Overlap, layers, and whether other samples give the same neurons."""
    msns = lab.scores.select(RATIO)
    asked = zip(*lab.mined.values(), strict=True)
    both = [sample for question in asked for sample in question]
    parts = [
        ml.mine(lab.model, both[n : n + 10], batch_size=10, progress=False)
        for n in range(0, len(both), 10)
    ]
    found: list[Any] = [
        ml.experiments.overlap(msns),
        ml.experiments.layer_distribution(msns),
        ml.experiments.stability(parts, RATIO),
    ]
    drawn = lab.picture(found[-1].figure(), "stability")
    return "\n\n".join([*(one.summary for one in found), drawn])


def attention(lab: Lab) -> str:
    """Whether the attention metrics add anything."""
    data = [sample for some in lab.mined.values() for sample in some]
    return ml.experiments.attention_effect(lab.model, data, batch_size=BATCH).summary

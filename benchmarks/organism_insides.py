"""Parts of an organism's page: where in the model something is, and what it comes from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

import miner_lens as ml
from benchmarks.lab import BATCH, RATIO, Lab, by_accent, markdown, shown_as, spans
from miner_lens.data.labelled import labelled

SHOWN = (0, 5, 10, 15, 20, 25, 29)  # layers


def lens(lab: Lab) -> str:
    """Entropy by layer and modality, and where it changes course."""
    lines = []
    for ask, some in lab.asked("lens").items():
        seen = ml.run(lab.model, some, ml.LogitLensAnalyzer(), batch_size=8)
        curves = seen.curves()
        drawn = ml.plots.curves(curves, "entropy")
        lines += [lab.picture(drawn, f"entropy-{ask}"), ""]
        for modality, found in seen.stages().items():
            ends = [f"{layer} [{low}, {high}]" for layer, low, high in zip(*found, strict=True)]
            lines.append(
                f"- asked about the {ask}, {modality} tokens: entropy changes course at layer "
                f"{', '.join(ends) or '(none)'}"
            )
        own = curves[(curves["measure"] == "entropy") & curves["layer"].isin(SHOWN)]
        wide = spans(own, "mean", "entropy", 2).pivot_table(
            "entropy", "modality", "layer", "first", sort=False
        )
        lines += ["", wide.reset_index().to_markdown(index=False), ""]
    return "\n".join(lines).rstrip()


def tuned(lab: Lab) -> str:
    """How far the plain and a tuned lens are from the last layer."""
    first = [sample for some in lab.mined.values() for sample in some]
    last = [sample for some in lab.asked("tuned").values() for sample in some]
    fitted = ml.run(lab.model, first, ml.TunedLensAnalyzer(), batch_size=8)
    found = ml.run(lab.model, last, ml.LensDivergenceAnalyzer(fitted), batch_size=8)
    curves = found.curves()
    shown = spans(curves[curves["layer"].isin(SHOWN)], "mean", "KL")
    wide = shown.pivot_table("KL", ["modality", "measure"], "layer", "first", sort=False)
    return (
        f"KL divergence from the last layer's distribution, in nats, by layer; {fitted!r}, fitted "
        f"to the questions that are mined and held against {len(last)} others.\n\n"
        f"{wide.reset_index().to_markdown(index=False)}"
    )


def convergence(lab: Lab) -> str:
    """CKA, distance, separability and dimension by layer, beside their nulls."""
    medium = lab.subject.inputs[0]
    states = ml.run(
        lab.model,
        lab.asked("convergence")[medium],
        ml.ConvergenceAnalyzer(samples=64),
        batch_size=8,
    )
    curves = states.curves(shuffles=20)
    pair = (curves["modality"] + " " + curves["other"]).str.strip()
    curves = curves.assign(pair=pair)
    cka = curves[(curves["measure"] == "cka")]
    drawn = lab.picture(ml.plots.curves(cka, "cka", by="pair"), "cka")
    shown = spans(curves[curves["layer"].isin(SHOWN)], "mean", "is")
    shown = shown.assign(said=shown["is"] + "; shuffled " + nulls(shown))
    wide = shown.pivot_table("said", ["measure", "pair"], "layer", "first", sort=False)
    return f"{shown_as(states)}\n\n{drawn}\n\n{wide.reset_index().to_markdown(index=False)}"


def reach(lab: Lab) -> str:
    """Semantic probing and telomeres, beside tokens shuffled between the two."""
    medium = lab.subject.inputs[0]
    found = ml.run(lab.model, lab.asked("reach")[medium], ml.SemanticReachAnalyzer(), batch_size=8)
    curves = found.curves()
    shown = spans(curves[curves["layer"].isin(SHOWN)], "mean", "is")
    shown = shown.assign(shuffled=nulls(shown))[
        ["measure", "modality", "layer", "samples", "is", "shuffled"]
    ]
    layers = [
        f"{measure} of {modality} lies above every shuffle's mean with its whole interval in "
        f"{int((some['low'] > some['null_high']).sum())} of {len(some)} layers, below in "
        f"{int((some['high'] < some['null_low']).sum())}"
        for (measure, modality), some in curves.groupby(["measure", "modality"], sort=False)
    ]
    said = "; ".join(layers)
    return f"{said[0].upper()}{said[1:]}.\n\n{markdown(shown)}"


def flow(lab: Lab) -> str:
    """Attention of the last token cut off from a modality, with and without MSNs."""
    medium = lab.subject.inputs[0]
    few = lab.asked("flow")[medium]
    off = lab.scores.select(RATIO)[medium]
    intact = ml.information_flow(lab.model, few, [medium, "text"], 6, BATCH)
    with ml.ablate(lab.model, off):
        without = ml.information_flow(lab.model, few, [medium], 6, BATCH)
    paid = ml.run(lab.model, few, ml.AttentionFlowAnalyzer(), batch_size=4)
    tables = []
    for name, found in (("intact", intact), (f"{medium} MSNs off", without)):
        curves = found.curves()
        tables.append(curves[curves["measure"] == "logprob"].assign(model=name))
    both = pd.concat(tables)
    both["line"] = both["modality"] + ", " + both["model"]
    drawn = lab.picture(
        ml.plots.curves(both.drop(columns="measure"), "cost of six layers cut (nats)", by="line"),
        "flow",
    )
    shown = both[both["layer"] % 3 == 0].assign(layers=lambda t: _window(t))
    shown = spans(shown, "mean", "cost")
    cut = shown.pivot_table("cost", "layers", ["modality", "model"], "first", sort=False)
    cut.columns = [f"{modality}, {model}" for modality, model in [*cut.columns]]
    gradient = paid.curves()
    highest = []
    for (measure, modality), some in gradient.groupby(["measure", "modality"], sort=False):
        top = some.sort_values("mean").iloc[-1]
        highest.append(
            f"{measure} of {modality} is largest in layer {int(top['layer'])} "
            f"({top['mean']:z.3f} [{top['low']:z.3f}, {top['high']:z.3f}])"
        )
    return (
        f"{drawn}\n\nNats lost where the last token's attention to a modality is cut off in six "
        f"layers:\n\n{cut.reset_index().to_markdown(index=False)}\n\nAttention times gradient, at "
        f"the last token: {'; '.join(highest)}."
    )


def patching(lab: Lab) -> str:
    """What layers and neurons restore of the difference between a prompt and its counterfactual."""
    medium = lab.subject.inputs[0]
    asked = ml.datasets.load(lab.subject.data, limit=300, ask=medium)
    alike: dict[int, list[ml.Sample]] = {}
    for sample in asked:
        tokens = ml.inputs(lab.model, sample.messages)["input"].shape[1]
        alike.setdefault(tokens, []).append(sample)
    pairs = [pair for some in alike.values() for pair in ml.counterfactuals(some)][:16]
    msns = lab.scores.select(RATIO)
    everything = ml.NeuronSet.union(msns)
    sets = {
        **msns,
        "all": everything,
        "random, as all": ml.NeuronSet.random(len(everything), everything, seed=0),
    }
    neurons = ml.activation_patching(lab.model, pairs, sets)
    layers = ml.activation_patching(lab.model, pairs[:4])
    curves = layers.curves()
    at = curves.rename(columns={"modality": "tokens"})
    drawn = lab.picture(
        ml.plots.curves(at, "share of the logit difference", by="tokens"), "patching"
    )
    shown = spans(curves[curves["layer"].isin(SHOWN)], "mean", "restored", 2)
    wide = shown.pivot_table("restored", "modality", "layer", "first", sort=False)
    own = spans(neurons.curves(), "mean", "restored")
    own = own.rename(columns={"modality": "neurons"})[["neurons", "restored"]]
    return (
        f"X of neurons put in, by set:\n\n{markdown(own)}\n\nThe residual stream after a layer "
        f"put in, at the tokens of a modality (4 of the pairs):\n\n{drawn}\n\n"
        f"{wide.reset_index().to_markdown(index=False)}"
    )


def kinds(lab: Lab) -> str:
    """Neurons sorted by what drives them, and what each kind has of the MSNs."""
    medium = lab.subject.inputs[0]
    found = ml.run(lab.model, lab.mined[medium], ml.KindAnalyzer(medium), batch_size=BATCH)
    sorted_ = found.select()
    msns, total = lab.scores.select(RATIO), sum(map(len, sorted_.values()))
    rows = []
    for kind, neurons in sorted_.items():
        shares = {
            f"of the {modality} MSNs": f"{len(neurons & own) / len(own):.1%}"
            for modality, own in msns.items()
        }
        rows.append(
            {"kind": kind, "neurons": len(neurons), "of all": f"{len(neurons) / total:.1%}"}
            | shares
        )
    layers = ml.experiments.layer_distribution(sorted_).summary
    return f"{pd.DataFrame(rows).to_markdown(index=False)}\n\n{layers}"


def domains(lab: Lab) -> str:
    """Data sets as domains."""
    every = {
        data: ml.datasets.load(data, limit=lab.mined_count + lab.tried_count, ask=ask)
        for data, ask in lab.subject.sets
    }
    first = {name: some[: lab.mined_count] for name, some in every.items()}
    last = {
        name: some[lab.mined_count :][: lab.questions("domains")] for name, some in every.items()
    }
    return domain_neurons(
        lab, first, last, ["llm", lab.subject.inputs[0].replace("image", "vision")]
    )


def texts(lab: Lab) -> str:
    """Kinds of text as domains."""
    first = by_label(ml.datasets.load("text-domains", split="train", limit=120))
    last = by_label(ml.datasets.load("text-domains", limit=4 * lab.questions("texts")))
    return domain_neurons(lab, first, last, ["llm"])


def voices(lab: Lab) -> str:
    """Accents of the voices as domains, in the decoder and in the audio tower."""
    groups = by_accent()
    first = {accent: some[:24] for accent, some in groups.items()}
    last = {accent: some[24 : 24 + lab.questions("voices")] for accent, some in groups.items()}
    return domain_neurons(lab, first, last, ["llm", "audio"])


def domain_neurons(
    lab: Lab,
    first: Mapping[str, Sequence[ml.Sample]],
    last: Mapping[str, Sequence[ml.Sample]],
    sites: Sequence[str],
) -> str:
    """MMNeuron's domain neurons, counted on some samples, and every domain without each's."""
    readers = [ml.DomainAnalyzer(site) for site in sites]
    found: Any = ml.run(lab.model, labelled(first), *readers, batch_size=8)
    counts = [found] if len(sites) == 1 else [*found]
    chosen = {one.site: one.select(0.01) for one in counts}
    lines = [
        f"Counted on {', '.join(f'{len(some)} of {name}' for name, some in first.items())}; tried "
        f"on {', '.join(f'{len(some)} of {name}' for name, some in last.items())} others. Of each "
        "site 1 % of the neurons are selected (a neuron may be of several domains)."
    ]
    for one in counts:
        lines.append(shown_as(one))
        own = chosen[one.site]
        sizes = ", ".join(f"{name} {len(neurons)}" for name, neurons in own.items())
        layers = ml.experiments.layer_distribution(own).summary
        shared = [
            f"{names} {count} (by chance {chance:.1f})"
            for names, (count, chance) in ml.experiments.overlap(own).totals.items()
            if "&" in names and count
        ]
        lines.append(
            f"{one.site}: {sizes}. In exactly these: {'; '.join(shared) or 'none in two'}. {layers}"
        )
    matrix = ml.domain_matrix(
        lab.model, labelled(last), *chosen.values(), sites=[[site] for site in sites], seeds=1
    )
    table = matrix.to_frame()
    shown = table[table["measure"] == "logprob"].rename(
        columns={"cost_low": "low", "cost_high": "high"}
    )
    shown = spans(
        shown[
            ["off", "sites", "neurons", "on", "samples", "cost", "low", "high", "control", "p_holm"]
        ],
        "cost",
        "nats",
    )
    own_rows = table[(table["measure"] == "logprob") & (table["off"] == table["on"])]
    others = table[(table["measure"] == "logprob") & (table["off"] != table["on"])]
    lines.append(
        f"{int(own_rows['beyond_chance'].sum())} of {len(own_rows)} sets cost their own domain "
        f"more log-probability than random ones in the same layers do (Holm, 5 %), and "
        f"{int(others['beyond_chance'].sum())} of {len(others)} another domain. In nats:"
    )
    lines.append(markdown(shown))
    return "\n\n".join(lines)


def by_label(samples: Sequence[ml.Sample]) -> dict[str, list[ml.Sample]]:
    """Samples by their label."""
    found: dict[str, list[ml.Sample]] = {}
    for sample in samples:
        found.setdefault(str(sample.label), []).append(sample)
    return found


def nulls(curves: pd.DataFrame) -> list[str]:
    """Means of the shuffles, with the least and the greatest."""
    return [
        f"{row.null:z.3f} [{row.null_low:z.3f}, {row.null_high:z.3f}]"
        for row in curves.itertuples()
    ]


def _window(curves: pd.DataFrame) -> list[str]:
    return [
        f"{first} to {last}"
        for first, last in zip(curves["layer"], curves["last_layer"], strict=True)
    ]

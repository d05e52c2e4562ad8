"""Neuron cards: all that is known of one neuron, on one page."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

from miner_lens.analyzers.attribution import AttributionAnalyzer
from miner_lens.analyzers.contribution import ContributionAnalyzer
from miner_lens.analyzers.directions import (
    nearest_by_direction,
    output_direction,
    vocabulary_effect,
)
from miner_lens.analyzers.domains import DomainAnalyzer
from miner_lens.analyzers.importance import ImportanceAnalyzer
from miner_lens.analyzers.top_activations import TopActivationsAnalyzer
from miner_lens.data.labelled import labelled
from miner_lens.data.sample import Sample
from miner_lens.experiments.card_view import card_html
from miner_lens.experiments.condition import Condition
from miner_lens.experiments.figures import COLOURS
from miner_lens.experiments.moments import Moment, moment
from miner_lens.experiments.result import Finding
from miner_lens.experiments.statistics import costs
from miner_lens.experiments.trials import trials
from miner_lens.installed import versions
from miner_lens.models.access import identity
from miner_lens.neurons.neuron_set import NeuronSet
from miner_lens.running.run import run
from miner_lens.scoring.domain_counts import DomainCounts
from miner_lens.scoring.kernels import METRICS
from miner_lens.scoring.scores import ImportanceScores

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, eq=False, repr=False)
class NeuronCard(Finding):
    """What is known of one decoder neuron.

    The table has a row for each score: `group` (`modality`, or `domain`: a label), `name`,
    `metric`, `value`, and `rank` among all neurons of the model (1 is the largest). Metrics are
    those of the scores, such as MINER's five and `attribution`; `mean X`, not normalised; and of a
    domain `active`, the share of tokens at which X is positive.
    """

    @property
    def layer(self) -> int:
        """The neuron's layer."""
        return int(self.info["layer"])

    @property
    def neuron(self) -> int:
        """Its place in the layer."""
        return int(self.info["neuron"])

    @property
    def moments(self) -> list[Moment]:
        """The samples that fire it most, the strongest first."""
        return [Moment.from_dict(one) for one in self.info["moments"]]

    @property
    def promotes(self) -> list[tuple[str, float]]:
        """The tokens that its output direction promotes most, and their logits."""
        return [(word, value) for word, value in self.info["promotes"]]

    @property
    def suppresses(self) -> list[tuple[str, float]]:
        """The tokens that its output direction suppresses most, and their logits."""
        return [(word, value) for word, value in self.info["suppresses"]]

    @property
    def neighbours(self) -> list[tuple[int, int, float]]:
        """(layer, neuron, cosine) of the neurons with the most similar output directions."""
        return [(layer, neuron, cosine) for layer, neuron, cosine in self.info["neighbours"]]

    @property
    def costs(self) -> list[Mapping[str, Any]]:
        """What switching it off alone costs, as `statistics.costs` has it, for each label."""
        return list(self.info["costs"])

    @property
    def summary(self) -> str:
        """What the card says, in a few computed sentences."""
        return " ".join(_sentences(self))

    def figure(self) -> Figure:
        """Its scores by modality, a panel for each metric."""
        from miner_lens.experiments.shown_figure import ShownFigure

        rows = self.frame[self.frame["group"] == "modality"]
        names = list(rows["metric"].unique())
        figure = ShownFigure(1.5 + 2.4 * len(names), 3.0)
        panels = figure.subplots(1, len(names), squeeze=False)[0]
        for panel, metric in zip(panels, names, strict=True):
            own = rows[rows["metric"] == metric]
            colours = [COLOURS.get(name, "#999999") for name in own["name"]]
            panel.barh(own["name"], own["value"], color=colours)
            panel.invert_yaxis()
            panel.axvline(0, color="black", linewidth=0.8)
            panel.set_title(metric)
            if metric in METRICS:
                panel.set_xlim(0, 1)
        return figure

    def _repr_html_(self) -> str:
        return card_html(self)


def card(
    model: Any,
    data: Iterable[Any] | Mapping[str, Iterable[Any]],
    layer: int,
    neuron: int,
    scores: Sequence[ImportanceScores] = (),
    k: int = 6,
    limit: int | None = None,
    batch_size: int = 8,
    progress: bool = True,
) -> NeuronCard:
    """All that is known of one neuron of the decoder, on one page.

    Its scores by modality; where samples have labels, how often it is active under each; the
    samples that fire it most, token by token; what its output direction promotes and suppresses in
    the vocabulary, and the neurons whose directions are most alike; and where samples have
    answers, its attribution and contribution and what switching it off alone costs.

    Args:
        model: A `TransformerBridge` with a processor.
        data: Samples, or a mapping of names to samples, which are then labelled by those names.
            They are all held, as their paths or media are, since some are read twice.
        layer: The neuron's layer, from 0.
        neuron: Its place in the layer, from 0.
        scores: Scores of this model that are there already, from `mine` or `attribute`, to be
            shown in place of those that would be computed on `data`.
        k: How many samples, tokens of the vocabulary and neighbours.
        limit: So many samples at most, the first ones.
        batch_size: Samples in one pass.
        progress: Whether to show progress bars.

    Raises:
        ValueError: There is no such neuron, no data, scores are of another model, or weights are
            quantized or offloaded, so that directions cannot be read.

    Example:
        found = ml.card(model, data, layer=3, neuron=17)
        found.save("neuron.safetensors")
    """
    import pandas as pd

    if k < 1:
        raise ValueError(f"k must be at least 1, not {k!r}.")
    direction = output_direction(model, layer, neuron)
    known = identity(model)
    for one in scores:
        if one.identity is not None:
            one.identity.check(known, "ImportanceScores")
    items = labelled(data) if isinstance(data, Mapping) else data
    samples = [Sample.of(item) for item in islice(items, limit)]
    if not samples:
        raise ValueError("There is no data: the iterable of samples is empty.")
    answered = all(one.answers for one in samples)
    analyzers: list[Any] = [TopActivationsAnalyzer(layer, neuron, k)]
    if not scores:
        name = getattr(data, "name", None)
        analyzers.append(ImportanceAnalyzer(data=name))
        if answered:
            analyzers += [AttributionAnalyzer(name), ContributionAnalyzer(name)]
    if all(one.label is not None for one in samples):
        analyzers.append(DomainAnalyzer())
    results = run(model, samples, *analyzers, batch_size=batch_size, progress=progress)
    best, *others = results if isinstance(results, tuple) else (results,)
    promotes, suppresses = vocabulary_effect(model, direction, k)
    rows = [row for one in (*scores, *others) for row in _rows(one, layer, neuron)]
    found = [
        moment(model, samples[place], samples[place].id or f"sample {place}", layer, neuron)
        for place, _, _ in best
    ]
    info = {
        "layer": layer,
        "neuron": neuron,
        "neurons": known.total,
        "samples": len(samples),
        "identity": known.to_dict(),
        "data": getattr(data, "name", None),
        "versions": versions(),
        "moments": [one.to_dict() for one in found],
        "promotes": promotes,
        "suppresses": suppresses,
        "neighbours": nearest_by_direction(model, layer, neuron, k),
        "costs": [],
    }
    if answered and len(samples) > 1:
        info["costs"] = _costs(model, samples, (layer, neuron), batch_size, progress)
    return NeuronCard(pd.DataFrame(rows), info)


def _rows(result: ImportanceScores | DomainCounts, layer: int, neuron: int) -> Iterator[Any]:
    """The rows of the table that a result gives."""
    if isinstance(result, DomainCounts):
        for place, domain in enumerate(result.domains):
            tokens = int(result.tokens[place])
            if tokens:
                rates = result.over_zero[..., place] / tokens
                yield _row("domain", domain, "active", rates, layer, neuron)
        return
    occurring = [n for n, count in enumerate(result.occurrences) if count]
    for m, metric in enumerate(result.metrics):
        for place in occurring:
            values = result.values[m, place]
            yield _row("modality", result.modalities[place], metric, values, layer, neuron)
    if result.means is not None and set(result.metrics) <= set(METRICS):
        for place in occurring:
            values = result.means[place]
            yield _row("modality", result.modalities[place], "mean X", values, layer, neuron)


def _row(group: str, name: str, metric: str, values: Any, layer: int, neuron: int) -> Any:
    own = values[layer, neuron]
    rank = 1 + int((values > own).sum())
    return {"group": group, "name": name, "metric": metric, "value": float(own), "rank": rank}


def _costs(
    model: Any, samples: list[Sample], pair: tuple[int, int], batch_size: int, progress: bool
) -> list[dict[str, Any]]:
    off = Condition("off", NeuronSet.of([pair], model))
    table = trials(model, samples, [Condition("intact"), off], batch_size, progress).to_frame()
    # An interval needs two samples under a label.
    sizes = table.groupby("label", dropna=False)["sample"].transform("nunique")
    table = table[sizes > 1]
    if table.empty:
        return []
    lost = costs(table)
    lost = lost[lost["condition"] == "off"].drop(columns="condition")
    lost["label"] = lost["label"].where(lost["label"].notna(), "")
    return [{str(key): one for key, one in row.items()} for row in lost.to_dict("records")]


def _sentences(card: NeuronCard) -> Iterator[str]:
    rows, info = card.frame, card.info
    yield f"Neuron {card.neuron} of layer {card.layer}, on {info['samples']} samples."
    means = rows[(rows["metric"] == "mean X") & ~rows["name"].isin(["prompt", "special_text"])]
    if len(means):
        best = means.sort_values("value").iloc[-1]
        yield (
            f"On average X is highest at {best['name']} tokens ({best['value']:.3f}, rank "
            f"{best['rank']} of {info['neurons']})."
        )
    moments = card.moments
    if moments:
        at = [one.modalities[one.peak] for one in moments]
        most = max(dict.fromkeys(at), key=at.count)
        yield (
            f"Its strongest token is of modality {most} in {at.count(most)} of the {len(at)} "
            "samples that fire it most."
        )
        signs = [one.written[one.peak] > 0 for one in moments if one.written is not None]
        if signs:
            yield (
                f"There the up projection is positive in {sum(signs)} of {len(signs)}, in which it "
                "writes its direction; where it is negative, the opposite."
            )
    words = ", ".join(repr(word) for word, _ in card.promotes[:3])
    yield f"Its direction promotes {words} most."
    for row in card.costs:
        if row["measure"] != "logprob":
            continue
        where = f" under label {row['label']}" if row["label"] else ""
        shown = "" if row["low"] > 0 or row["high"] < 0 else ", which may be nothing"
        cost, low, high = (f"{row[key]:z.3g}" for key in ("cost", "low", "high"))
        yield (
            f"Switched off alone it costs {cost} [{low}, {high}] nats of the answer's "
            f"log-probability{where} ({row['samples']} samples){shown}."
        )

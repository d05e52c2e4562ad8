"""A paper's experiments as one description, and all of them run from there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from miner_lens import launchers
from miner_lens.analyzers.importance import mine
from miner_lens.data import datasets
from miner_lens.data.metrics import find
from miner_lens.data.sample import Sample
from miner_lens.experiments.ablation_table import ablation_plan, read_ablation
from miner_lens.experiments.first_cards import first_cards
from miner_lens.experiments.layers import layer_distribution
from miner_lens.experiments.overlap import overlap
from miner_lens.experiments.plan import Plan
from miner_lens.experiments.ratio_sweep import ratio_plan, read_ratios
from miner_lens.experiments.record import keep_record
from miner_lens.experiments.result import Finding
from miner_lens.experiments.selection_grid import grid_plan, read_grid
from miner_lens.experiments.table import Trials
from miner_lens.experiments.trials import trials
from miner_lens.experiments.values import read_values, value_plan
from miner_lens.models.access import layout
from miner_lens.neurons.writing import Value
from miner_lens.scoring.scores import ImportanceScores
from miner_lens.scoring.select import PUBLISHED

_Read = Callable[[Trials, Plan], Finding]


@dataclass(frozen=True)
class Source:
    """A data set of a protocol: what is mined, and then asked.

    Attributes:
        name: As `ml.datasets.load` takes it.
        samples: So many at most.
        metric: The name of the metric, from 0 to 1, by which an answer is right.
        medium: What a model must have to be asked; None: nothing but text.
        split: As `ml.datasets.load` takes it.
        ask: As `ml.datasets.load` takes it.

    Example:
        >>> Source("easy-vqa", 100, "exact_match", "image", ask="text").label
        'easy-vqa-text'
    """

    name: str
    samples: int
    metric: str
    medium: str | None = None
    split: str | None = None
    ask: str | None = None

    @property
    def label(self) -> str:
        """What tables and files call it."""
        return self.name if self.ask is None else f"{self.name}-{self.ask}"

    def load(self, limit: int | None = None, data_root: Path | None = None) -> Any:
        """Its samples: from a folder of its name in `data_root`, or else as `ml.datasets.load`.

        Raises:
            ValueError: As `ml.datasets.load`.
            FileNotFoundError: `data_root` does not exist, or as `ml.datasets.load`.
        """
        if data_root is not None and not data_root.is_dir():
            raise FileNotFoundError(
                f"There is no folder {data_root}. Name one that has a folder for each data set, "
                f"such as {data_root / self.name}."
            )
        folder = None if data_root is None else data_root / self.name
        some = self.samples if limit is None else min(limit, self.samples)
        path = folder if folder is not None and folder.is_dir() else None
        return datasets.load(self.name, self.split, some, self.ask, path)


@dataclass(frozen=True)
class Protocol:
    """What a paper does, for `reproduce`.

    Attributes:
        name: The paper's.
        data: The data sets; a model is asked those whose medium it has.
        ratio: The share of neurons that is selected where nothing else is said.
        ratios: Those of the ratio sweep.
        strategy: The strategy where nothing else is said.
        strategies: Those of the grid, and of the selections that are saved.
        values: What is written into neurons that are off.
        seeds: Of the controls, which are ours and not the paper's.
        max_new_tokens: The length of an answer at most.
    """

    name: str
    data: tuple[Source, ...]
    ratio: float = 0.02
    ratios: tuple[float, ...] = (0.001, 0.005, 0.01, 0.015, 0.02, 0.05, 0.1)
    strategy: str = "LA_MU"
    strategies: tuple[str, ...] = PUBLISHED
    values: tuple[Value, ...] = ("zero", "min")
    seeds: tuple[int, ...] = (0, 1, 2)
    max_new_tokens: int = 128

    def on(self, organism: str) -> Protocol:
        """The same with the data sets of an organism that ships, which knows no other.

        Their answers are a word, right by exact match: what goes on for longer is wrong, however
        long it is let go on, so it is not.

        Raises:
            ValueError: There are none for it.
        """
        if organism not in STAND_INS:
            raise ValueError(
                f"No data sets stand in for {self.name}'s on {organism!r}; there are some for "
                f"{', '.join(STAND_INS)}."
            )
        longest = min(self.max_new_tokens, STAND_IN_TOKENS)
        return replace(self, data=STAND_INS[organism], max_new_tokens=longest)

    def sources(self, model: Any) -> list[Source]:
        """The data sets whose medium a model has.

        Raises:
            ValueError: It has none of them.
        """
        media = {None, *layout(model).media}
        found = [source for source in self.data if source.medium in media]
        if not found:
            wanted = sorted({str(source.medium) for source in self.data})
            raise ValueError(f"{self.name} asks about {', '.join(wanted)}; the model has no such.")
        return found

    def plans(self, scores: ImportanceScores) -> dict[str, tuple[Plan, _Read]]:
        """By experiment, what is switched off, and what reads the table of trials.

        Raises:
            ValueError: As `select`.
        """
        how: dict[str, Any] = {"strategy": self.strategy, "seeds": self.seeds}
        return {
            "ablation-table": (ablation_plan(scores, self.ratio, **how), read_ablation),
            "ratio-sweep": (ratio_plan(scores, self.ratios, **how), read_ratios),
            "selection-grid": (grid_plan(scores, self.ratio, self.strategies), read_grid),
            "ablation-values": (value_plan(scores, self.values, self.ratio, **how), read_values),
        }


# By MINER's published code, `main.py` and its config: all samples of each split, and the defaults
# of `mine` and `select`.
MINER = Protocol(
    "MINER",
    (
        Source("textvqa", 5_000, "containment", "image"),
        Source("coco_caption", 5_000, "tfidf_cosine", "image"),
        Source("mmlu", 14_042, "multiple_choice_published"),
        Source("msvd_qa", 13_157, "containment", "video"),
        Source("librispeech", 2_620, "word_recognition_rate_published", "audio"),
        Source("vocalsound", 20_977, "containment", "audio", split="all"),
    ),
)


def _asked(name: str, *media: str) -> tuple[Source, ...]:
    asks = (*media, "text")
    return tuple(Source(name, 100, "exact_match", media[0], ask=ask) for ask in asks)


STAND_INS = {
    "shapes": _asked("easy-vqa", "image"),
    "smol-vl": _asked("easy-vqa", "image"),
    "speech": _asked("spoken-scenes", "audio"),
    "smol-audio": _asked("spoken-scenes", "audio"),
    "smol-omni": _asked("easy-vqa", "image", "audio"),
}


# More than any of their answers has, and its end.
STAND_IN_TOKENS = 8


def reproduce(
    model: Any,
    protocol: Protocol,
    out: str | Path,
    limit: int | None = None,
    data_root: str | Path | None = None,
    batch_size: int = 16,
    progress: bool = True,
) -> dict[str, Any]:
    """Do what a paper does: mine, select by each strategy, switch off, and ask.

    As in MINER's published code, neurons are switched off in the samples that were mined. Each step
    is kept in `out` when it is done, and mining and trials from time to time: called again with the
    same arguments after it was stopped, also by SIGKILL, it goes on, to the same tables. Under
    torchrun, accelerate or srun the processes share the work.

    Args:
        model: A `TransformerBridge` with a processor.
        protocol: What to do, such as `ml.experiments.MINER`.
        out: A folder for scores, neurons, tables of trials, results, figures and checkpoints.
        limit: So many samples of each data set at most.
        data_root: A folder that has data sets, each in a folder of its name and in the layout that
            `ml.datasets.load` reads; those that it lacks come from the hub.
        batch_size: Samples in one forward pass.
        progress: Whether to show progress bars.

    Returns:
        By name, for `ml.report`: the scores, the selected neurons, where they are, what each
        experiment found, and a card of the neuron of each modality that ranks first.

    Raises:
        ValueError: The model has no data set's medium, the folder is of another model, other data
            or another protocol, or as `ml.mine`, `select` and `ml.trials`.
        FileNotFoundError: There is no such data.

    Example:
        model = ml.load("Qwen/Qwen2-VL-7B-Instruct")
        results = ml.experiments.reproduce(model, ml.experiments.MINER, "miner", limit=200)
        ml.report(results, "miner/report.html")
    """
    out = Path(out)
    root = None if data_root is None else Path(data_root).expanduser()
    sources = protocol.sources(model)
    data = {source.label: source.load(limit, root) for source in sources}
    settings = asdict(replace(protocol, data=tuple(sources)))
    keep_record(out, model, data, settings)
    kept = out / "checkpoints"
    each = {}
    for label, samples in data.items():
        each[label] = mine(
            model, samples, batch_size=batch_size, progress=progress, checkpoint=kept / label
        )
        _save(each[label], out / "scores" / f"{label}.safetensors")
    scores = ImportanceScores.mean(each.values())
    _save(scores, out / "scores.safetensors")
    for strategy in protocol.strategies:
        for modality, neurons in scores.select(protocol.ratio, strategy).items():
            _save(neurons, out / "neurons" / f"{strategy}-{modality}.safetensors")
    chosen = scores.select(protocol.ratio, protocol.strategy)
    results: dict[str, Any] = {"scores": scores, "neurons": chosen}
    results |= {"layers": layer_distribution(chosen), "overlap": overlap(chosen)}
    judge = ByLabel(tuple((source.label, source.metric) for source in sources))
    for name, (plan, read) in protocol.plans(scores).items():
        table = trials(
            model,
            data,
            plan.conditions,
            batch_size,
            progress,
            metric=judge,
            max_new_tokens=protocol.max_new_tokens,
            checkpoint=kept / name,
        )
        _save(table, out / "trials" / f"{name}.safetensors")
        results[name] = read(table, plan)
    for name, result in results.items():
        if isinstance(result, Finding):
            _show(result, out, name)
    cards = first_cards(model, data, scores, chosen, out / "cards", batch_size, progress)
    return results | {f"first {modality} neuron": one for modality, one in cards.items()}


@dataclass(frozen=True)
class ByLabel:
    """How right an answer is, by the metric of the data set that a sample's label names.

    Attributes:
        metrics: Labels, each with a metric's name.
    """

    metrics: tuple[tuple[str, str], ...]

    def __call__(self, sample: Sample, answer: str) -> float:
        """From 0 to 1."""
        (value,) = find(dict(self.metrics)[str(sample.label)])([answer], [sample.answers])
        return min(1.0, max(0.0, float(value)))  # sums of floats may pass 1


def _save(result: Any, path: Path) -> None:
    if launchers.rank() == 0:  # all ranks have it
        result.save(path)


def _show(result: Finding, out: Path, name: str) -> None:
    """Write a result, its table and its figure."""
    _save(result, out / f"{name}.safetensors")
    if launchers.rank() == 0:
        result.frame.to_csv(out / f"{name}.csv", index=False)
        result.figure().savefig(out / f"{name}.png")

"""What a model answers to a data set, by the metrics that the data set names."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from miner_lens.data.metrics import Metrics, by_name, measure, require_answers
from miner_lens.data.sample import Sample
from miner_lens.experiments.evaluation import answers
from miner_lens.experiments.figures import panels
from miner_lens.experiments.resampling import CONFIDENCE, interval
from miner_lens.experiments.result import Finding

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

RESAMPLES = 5000


@dataclass(frozen=True, eq=False, repr=False)
class Evaluation(Finding):
    """Each answer of a model, and what each metric says of it.

    The table has a row for each sample: `sample`, `label`, `answer`, and a column of values for
    each metric, missing where the sample's data set does not name it.
    """

    @property
    def metrics(self) -> list[str]:
        """The metrics' names."""
        return [str(name) for name in self.frame.columns[3:]]

    @property
    def means(self) -> pd.DataFrame:
        """Each metric's mean over the samples of each label.

        The columns are `label`, `metric`, `samples`, `mean`, and `low` and `high`, a 95 %
        percentile bootstrap interval over samples (5,000 resamples, seed 0), missing where there
        is one sample.

        Raises:
            ImportError: scipy is missing.
        """
        import pandas as pd

        rows = []
        for label, part in self.frame.groupby("label", sort=False, dropna=False):
            for metric in self.metrics:
                values = part[metric].dropna().to_numpy()
                if not len(values):
                    continue
                low, high = np.nan, np.nan
                if len(values) > 1:
                    low, high = (float(end[0]) for end in interval(values[None], RESAMPLES, seed=0))
                found = {"samples": len(values), "mean": values.mean(), "low": low, "high": high}
                rows.append({"label": label, "metric": metric, **found})
        return pd.DataFrame(rows)

    @property
    def summary(self) -> str:
        """Each mean with its interval."""
        parts = [
            f"{f'{row.label} ' if isinstance(row.label, str) else ''}{row.metric} "
            f"{row.mean:.3f} [{row.low:.3f}, {row.high:.3f}] of {row.samples}"
            for row in self.means.itertuples()
        ]
        return f"Means with {CONFIDENCE:.0%} intervals over samples: {'; '.join(parts)}."

    def figure(self) -> Figure:
        """A panel for each metric: each label's mean with its interval."""
        means = self.means
        found, axes = panels(len(self.metrics))
        for panel, metric in zip(axes, self.metrics, strict=True):
            rows = means[means["metric"] == metric]
            names = rows["label"].fillna("all").astype(str)
            ends = [rows["mean"] - rows["low"], rows["high"] - rows["mean"]]
            panel.errorbar(rows["mean"], names, xerr=np.nan_to_num(ends), fmt="o", color="#0072b2")
            panel.set_xlabel(metric)
        return found


def evaluate(
    model: Any,
    data: Iterable[Any] | Mapping[str, Iterable[Any]],
    metrics: Metrics | None = None,
    batch_size: int = 16,
    max_new_tokens: int = 128,
) -> Evaluation:
    """Ask every question, greedily, and measure the answers by the data set's metrics.

    What is switched off at the moment stays off: evaluate inside `ml.ablate` and outside.

    Args:
        model: A `TransformerBridge` with a processor.
        data: Samples with answers, or mappings as `Sample.of` takes them; or several data sets by
            name, each measured by its own metrics and labelled by its name.
        metrics: Names of metrics (`ml.metrics.METRICS`), or functions by name; None: those that the
            data set names in its attribute `metrics`, and `exact_match` where it names none.
        batch_size: Samples in one forward pass.
        max_new_tokens: The length of an answer at most.

    Raises:
        ValueError: There are no samples, one has no answers or two have one id, there is no such
            metric, or a metric does not fit.
        ImportError: The package that a metric needs is missing.
        SampleError: A sample cannot be read.

    Example:
        result = ml.evaluate(model, ml.datasets.load("easy-vqa", limit=100))
        print(result.means)
        with ml.ablate(model, msns["image"]):
            print(ml.evaluate(model, data, metrics=["containment", "anls"]).summary)
    """
    import pandas as pd

    named = data if isinstance(data, Mapping) else {None: data}
    # All names now, not after hours.
    wanted: list[Metrics] = [
        by_name(getattr(one, "metrics", ("exact_match",)) if metrics is None else metrics)
        for one in named.values()
    ]
    parts = []
    for (name, samples), chosen in zip(named.items(), wanted, strict=True):
        asked = _Asked(samples)
        given = answers(model, asked, batch_size, max_new_tokens)
        if not given:
            where = "" if name is None else f" in {name!r}"
            raise ValueError(f"There is no data{where}: the iterable of samples is empty.")
        labels = asked.labels if name is None else [name] * len(given)
        columns = {"sample": asked.ids, "label": labels, "answer": list(given)}
        parts.append(pd.DataFrame(columns | measure(chosen, given, asked.references)))
    frame = pd.concat(parts, ignore_index=True)
    frame["label"] = frame["label"].astype(object).where(frame["label"].notna(), None)
    return Evaluation(frame, {"max_new_tokens": max_new_tokens})


class _Asked:
    """Samples as they go by; what is kept of them holds no media."""

    def __init__(self, samples: Iterable[Any]) -> None:
        self._samples = samples
        self.ids: list[str] = []
        self.labels: list[str | None] = []
        self.references: list[tuple[str, ...]] = []

    def __iter__(self) -> Iterator[Sample]:
        for sample in map(Sample.of, self._samples):
            require_answers(sample)
            self.ids.append(sample.id or f"sample {len(self.ids)}")
            self.labels.append(sample.label)
            self.references.append(tuple(sample.answers))
            yield sample
        twice = [name for name, times in Counter(self.ids).items() if times > 1]
        if twice:
            raise ValueError(f"Two samples have the id {twice[0]!r}; give each one of its own.")

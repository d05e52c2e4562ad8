"""In which layers does a modality reach the last token? Attention knockout by windows of layers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from miner_lens.data.sample import Sample
from miner_lens.experiments.statistics import costs
from miner_lens.experiments.table import Trials
from miner_lens.experiments.trials import WINDOW, Item
from miner_lens.models.access import identity, layout
from miner_lens.models.bridge import prepared_bridge
from miner_lens.models.collate import collate, fit, kinds
from miner_lens.models.forcing import Forced, force, logprob, tokenizer_of
from miner_lens.models.forward import evaluating, last_logits
from miner_lens.models.generation import input_device, to_device
from miner_lens.models.identity import ModelIdentity
from miner_lens.models.inside import hf_model_of
from miner_lens.models.result import Result
from miner_lens.neurons.knockout import knockout
from miner_lens.scoring.select import SPLITS

if TYPE_CHECKING:
    import pandas as pd

INTACT = "intact"


@dataclass(frozen=True)
class Cut:
    """What is cut in a condition.

    Attributes:
        modality: Whose tokens the last token does not attend to.
        first: The first layer of the window.
        last: The last one.
    """

    modality: str
    first: int
    last: int

    @property
    def condition(self) -> str:
        """The condition's name in the table of trials."""
        return f"{self.modality} in layers {self.first} to {self.last}"


@dataclass(frozen=True, eq=False, repr=False)
class InformationFlow(Result):
    """What answers lose when the last token does not attend to a modality, by window of layers.

    Attributes:
        trials: Every sample intact and under every cut. Here `correct` is whether each token of the
            answer is the most probable; the end of the turn does not count.
        cuts: The cuts.
        identity: The model.
    """

    filename: ClassVar[str] = "information-flow.safetensors"

    trials: Trials
    cuts: tuple[Cut, ...]
    identity: ModelIdentity | None = None

    def curves(self) -> pd.DataFrame:
        """What each cut costs, with 95 % bootstrap intervals over samples.

        Returns:
            A table of the columns label, modality, measure (`correct`, or `logprob` in nats), layer
            (the window's first), last_layer, samples, mean (the cost), low and high.

        Raises:
            ValueError: A label has fewer than two samples.
            ImportError: scipy is missing.
        """
        table = costs(self.trials.to_frame(), INTACT)
        table = table[table["condition"] != INTACT].reset_index(drop=True)
        about = {cut.condition: cut for cut in self.cuts}
        cuts = [about[name] for name in table.pop("condition")]
        table.insert(1, "modality", [cut.modality for cut in cuts])
        table.insert(3, "layer", [cut.first for cut in cuts])
        table.insert(4, "last_layer", [cut.last for cut in cuts])
        return table.drop(columns="value").rename(columns={"cost": "mean"})

    def __repr__(self) -> str:
        lost = self.trials.logprob[:1] - self.trials.logprob[1:]
        lines = [f"InformationFlow({len(self.trials.samples)} samples; cost of logprob in nats)"]
        for cut, row in zip(self.cuts, lost, strict=True):
            lines.append(f"{cut.condition:<28} {row.mean():8.3f}")
        return "\n".join(lines)

    def overview(self) -> pd.DataFrame:
        """The mean cost of each cut."""
        import pandas as pd

        rows = {cut.condition: place for place, cut in enumerate(self.cuts, 1)}
        measures = {"correct": self.trials.correct, "logprob": self.trials.logprob}
        costs = {
            name: [float(values[0].mean() - values[place].mean()) for place in rows.values()]
            for name, values in measures.items()
        }
        return pd.DataFrame(costs, list(rows)).rename_axis("cost of")

    def to_parts(self) -> tuple[dict[str, Tensor | None], dict[str, Any]]:
        """What a file of the flow holds."""
        tensors: dict[str, Tensor | None] = {
            "correct": torch.from_numpy(self.trials.correct),
            "logprob": torch.from_numpy(self.trials.logprob),
        }
        return tensors, {
            "samples": self.trials.samples,
            "labels": self.trials.labels,
            "cuts": [vars(cut) for cut in self.cuts],
        }

    @classmethod
    def from_parts(
        cls,
        tensors: Mapping[str, Tensor],
        metadata: Mapping[str, Any],
        identity: ModelIdentity | None,
    ) -> InformationFlow:
        """The flow that a file holds."""
        cuts = tuple(Cut(**cut) for cut in metadata["cuts"])
        table = Trials(
            tuple(metadata["samples"]),
            tuple(metadata["labels"]),
            (INTACT, *(cut.condition for cut in cuts)),
            tensors["correct"].numpy(),
            tensors["logprob"].numpy(),
        )
        return cls(table, cuts, identity)


def information_flow(
    model: Any,
    data: Iterable[Item],
    modalities: Sequence[str] = SPLITS["special_text_separate"],
    window: int = 3,
    batch_size: int = 16,
    progress: bool = True,
) -> InformationFlow:
    """Cut attention from the last token to each modality, in each window of layers, and try.

    The last token is the prompt's, where the answer is predicted; the answer's own tokens, which
    the model reads behind it, are cut off as well. To see what neurons have to do with it, call it
    inside `ml.ablate`.

    Args:
        model: A `TransformerBridge` with a processor.
        data: Samples with answers.
        modalities: Whose tokens; those that the model does not know of are passed over.
        window: So many layers are cut together; a window begins at each layer in which it fits.
        batch_size: Samples in one forward pass.
        progress: Whether to show a progress bar.

    Raises:
        ValueError: The window does not fit, no modality is known, no data, or a sample without
            answers.

    Example:
        flow = ml.information_flow(model, data, ["image"], window=3)
        flow.curves()
    """
    model = prepared_bridge(model)
    layers = len(model.blocks)
    if not 1 <= window <= layers:
        raise ValueError(
            f"window must lie between 1 and the model's {layers} layers, not {window}."
        )
    known = layout(model).masks(torch.zeros(1, 1, dtype=torch.long))
    here = [name for name in modalities if name in known]
    if not here:
        raise ValueError(f"The model knows none of {', '.join(modalities)}: {', '.join(known)}.")
    starts = range(layers - window + 1)
    cuts = [Cut(name, first, first + window - 1) for name in here for first in starts]
    names: list[str] = []
    labels: list[str | None] = []
    correct, logprobs = [], []
    samples = map(Sample.of, data)
    with evaluating(model), torch.no_grad(), tqdm(unit=" trials", disable=not progress) as bar:
        while some := list(islice(samples, WINDOW)):
            names += [one.id or f"sample {len(names) + n}" for n, one in enumerate(some)]
            labels += [one.label for one in some]
            asked = [force(model, sample) for sample in some]
            right = np.zeros((1 + len(cuts), len(some)), dtype=bool)
            total = np.zeros((1 + len(cuts), len(some)))
            for places in _batches(asked, batch_size):
                batch = [asked[place] for place in places]
                for row, cut in enumerate([None, *cuts]):
                    right[row, places], total[row, places] = _try(model, batch, cut)
                    bar.update(len(places))
            correct.append(right)
            logprobs.append(total)
    if not names:
        raise ValueError("There is no data: the iterable of samples is empty.")
    conditions = (INTACT, *(cut.condition for cut in cuts))
    table = Trials(
        tuple(names),
        tuple(labels),
        conditions,
        np.concatenate(correct, axis=1),
        np.concatenate(logprobs, axis=1),
    )
    return InformationFlow(table, tuple(cuts), identity(model))


def _batches(asked: Sequence[Forced], batch_size: int) -> Iterator[list[int]]:
    """Places of samples with answers of equal length that fit one another."""
    order = sorted(range(len(asked)), key=lambda n: (len(asked[n].answer), asked[n].length))
    batch: list[int] = []
    for place in order:
        fits = all(
            len(asked[other].answer) == len(asked[place].answer)
            and fit(kinds(asked[other].inputs), kinds(asked[place].inputs))
            for other in batch
        )
        if len(batch) == batch_size or not fits:
            yield batch
            batch = []
        batch.append(place)
    yield batch


def _try(model: Any, batch: Sequence[Forced], cut: Cut | None) -> tuple[list[bool], list[float]]:
    """Whether each answer is the most probable, and its log-probability."""
    if cut is not None:
        window = range(cut.first, cut.last + 1)
        with knockout(model, cut.modality, window, last=1 + len(batch[0].answer)):
            return _try(model, batch, None)
    hf_model = hf_model_of(model)
    together = collate([one.inputs for one in batch], tokenizer_of(model).pad_token_id or 0)
    count = 1 + len(batch[0].answer)
    with last_logits(hf_model, count):
        given = to_device(together, input_device(model))
        logits = hf_model(**given, use_cache=False).logits[:, -count:-1]
    pairs = list(zip(logits, batch, strict=True))
    right = [row.argmax(-1).tolist() == list(one.answer) for row, one in pairs]
    return right, [float(logprob(row, one.answer)) for row, one in pairs]

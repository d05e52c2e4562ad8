"""Where is the difference between two prompts? Activation patching, by layer and modality."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from miner_lens.data.sample import Sample
from miner_lens.models.access import identity, layout
from miner_lens.models.bridge import prepared_bridge
from miner_lens.models.forcing import tokenizer_of
from miner_lens.models.forward import evaluating
from miner_lens.models.generation import inputs as model_inputs
from miner_lens.models.identity import ModelIdentity
from miner_lens.models.points import activation_points, residual_points
from miner_lens.models.result import Result
from miner_lens.neurons.ablation import check_neurons
from miner_lens.neurons.neuron_set import NeuronSet

if TYPE_CHECKING:
    import pandas as pd

LAST = "last"  # the prompt's last token
Pair = tuple[Sample, Sample]
Hooks = list[tuple[str, Callable[..., Tensor]]]


def counterfactuals(data: Iterable[Sample], limit: int | None = None) -> list[Pair]:
    """Pairs of samples that ask the same in the same words, and have different answers.

    Such as the same question about a red circle and about a blue one. Each sample is in one pair at
    most.

    Args:
        data: Samples with answers.
        limit: So many pairs at most.

    Example:
        >>> asked = [{"role": "user", "content": [{"type": "text", "text": "which colour?"}]}]
        >>> one, other = Sample(asked, "red", "a"), Sample(asked, "blue", "b")
        >>> [(a.id, b.id) for a, b in counterfactuals([one, other, one])]
        [('a', 'b')]
    """
    waiting: dict[str, list[Sample]] = {}
    pairs: list[Pair] = []
    for sample in data:
        rest = waiting.setdefault(_words(sample), [])
        found = next((one for one in rest if one.answers[:1] != sample.answers[:1]), None)
        if found is None:
            rest.append(sample)
            continue
        rest.remove(found)
        pairs.append((found, sample))
        if len(pairs) == limit:
            break
    return pairs


@dataclass(frozen=True, eq=False, repr=False)
class Patching(Result):
    """What patching restores of the difference between prompts and their counterfactuals.

    The logit difference is the logit of the clean prompt's answer minus that of the
    counterfactual's, at the last token, by the first token of each.

    Attributes:
        clean: The logit difference after the clean prompt.
        corrupted: After the counterfactual.
        patched: After the counterfactual, with something of the clean prompt put into it.
        what: What was put in: a layer's residual stream at a modality's tokens, as (modality,
            layer), or a set of neurons, as (its name, -1).
        identity: The model.
    """

    filename: ClassVar[str] = "patching.safetensors"

    clean: Float[Tensor, " pair"]
    corrupted: Float[Tensor, " pair"]
    patched: Float[Tensor, "what pair"]
    what: tuple[tuple[str, int], ...]
    identity: ModelIdentity | None = None

    def curves(self, resamples: int = 1000, seed: int = 0) -> pd.DataFrame:
        """The share of the logit difference that each patch restores.

        Of all pairs together: the mean of patched minus corrupted, over the mean of clean minus
        corrupted, so that pairs without a difference do no harm. 1 restores everything.

        Returns:
            A table of the columns modality (or the set's name), layer (-1 for a set), pairs, mean,
            low and high, a 95 % percentile bootstrap interval over pairs.

        Raises:
            ValueError: There are fewer than two pairs.
            ImportError: scipy is missing.
        """
        import pandas as pd

        if len(self.clean) < 2:
            raise ValueError(
                f"An interval needs at least two pairs, and there is {len(self.clean)}."
            )
        try:
            from scipy import stats
        except ImportError as error:
            raise ImportError("Intervals need scipy: pip install miner-lens[demo]") from error
        whole = (self.clean - self.corrupted).double().numpy()
        rows = []
        for (name, layer), patched in zip(self.what, self.patched, strict=True):
            back = (patched - self.corrupted).double().numpy()
            found = stats.bootstrap(
                (back, whole),
                _share,
                paired=True,
                vectorized=True,
                method="percentile",
                n_resamples=resamples,
                rng=seed,
            ).confidence_interval
            rows.append((name, layer, len(whole), _share(back, whole), found.low, found.high))
        return pd.DataFrame(rows, columns=["modality", "layer", "pairs", "mean", "low", "high"])

    def __repr__(self) -> str:
        whole = (self.clean - self.corrupted).numpy()
        gap = float(whole.mean())
        lines = [f"Patching({len(whole)} pairs, mean logit difference {gap:.2f}; restored)"]
        for name in dict.fromkeys(name for name, _ in self.what):
            own = [n for n, (other, _) in enumerate(self.what) if other == name]
            shares = [_share((self.patched[n] - self.corrupted).numpy(), whole) for n in own]
            lines.append(f"{name:<12}" + "".join(f" {share:6.2f}" for share in shares))
        return "\n".join(lines)

    def overview(self) -> pd.DataFrame:
        """The share of the logit difference that each patch restores, without intervals."""
        import pandas as pd

        whole = (self.clean - self.corrupted).double().numpy()
        rows = [
            (name, layer, _share((patched - self.corrupted).double().numpy(), whole))
            for (name, layer), patched in zip(self.what, self.patched, strict=True)
        ]
        return pd.DataFrame(rows, columns=["modality", "layer", "restored"])

    def to_parts(self) -> tuple[dict[str, Tensor | None], dict[str, Any]]:
        """What a file of the result holds."""
        tensors: dict[str, Tensor | None] = {
            "clean": self.clean,
            "corrupted": self.corrupted,
            "patched": self.patched,
        }
        return tensors, {"what": self.what}

    @classmethod
    def from_parts(
        cls,
        tensors: Mapping[str, Tensor],
        metadata: Mapping[str, Any],
        identity: ModelIdentity | None,
    ) -> Patching:
        """The result that a file holds."""
        what = tuple((str(name), int(layer)) for name, layer in metadata["what"])
        clean, corrupted = tensors["clean"], tensors["corrupted"]
        return cls(clean, corrupted, tensors["patched"], what, identity)


def activation_patching(
    model: Any,
    pairs: Sequence[Pair],
    neurons: Mapping[str, NeuronSet] | None = None,
    progress: bool = True,
) -> Patching:
    """Put activations of a prompt into its counterfactual, and see what comes back of its answer.

    By default the residual stream after each layer is put in, at one modality's tokens at a time,
    and at the last token (causal tracing: Meng et al. 2022, arXiv 2202.05262). With neurons, their
    X is, at all tokens: each set in all its layers together.

    Args:
        model: A `TransformerBridge` with a processor.
        pairs: (clean, counterfactual) samples with answers, as `counterfactuals` makes them. Both
            prompts must have as many tokens of each modality, in the same places.
        neurons: Sets of decoder neurons by name, such as what `select` returns, with
            `NeuronSet.random_like` beside them as controls.
        progress: Whether to show a progress bar.

    Raises:
        ValueError: There is no pair, a pair's prompts do not lie alike, its answers begin alike or
            are missing, or neurons are another model's.

    Example:
        pairs = ml.counterfactuals(data, limit=20)
        ml.activation_patching(model, pairs).curves()
    """
    model = prepared_bridge(model)
    pairs = list(pairs)
    if not pairs:
        raise ValueError("There is no pair. counterfactuals(data) finds some in a data set.")
    sets = {name: check_neurons(model, one) for name, one in (neurons or {}).items()}
    if others := [one.site for one in sets.values() if one.site != "llm"]:
        raise ValueError(f"Patching is of decoder neurons; a set is of site {others[0]!r}.")
    points = activation_points(model) if sets else residual_points(model)
    names = [point.name for point in points]
    clean, corrupted, patched = [], [], []
    what: list[tuple[str, int]] = []
    with evaluating(model), torch.no_grad():
        for one, other in tqdm(pairs, unit=" pairs", disable=not progress):
            given, against, masks = _prepared(model, one, other)
            asked = _answers(model, one, other)
            kept: dict[str, Tensor] = {}

            def keep(x: Tensor, hook: Any, kept: dict[str, Tensor] = kept) -> None:
                kept[hook.name] = x.detach().clone()

            clean.append(_difference(model, given, [(name, keep) for name in names], asked))
            corrupted.append(_difference(model, against, [], asked))
            patches = _of_sets(names, kept, sets) if sets else _of_layers(names, kept, masks)
            row = {key: _difference(model, against, hooks, asked) for key, hooks in patches.items()}
            what = what or list(row)
            if list(row) != what:
                raise ValueError(
                    f"{one.id or 'A pair'} has other modalities than the pairs before it; patch "
                    "pairs of one kind at a time."
                )
            patched.append(list(row.values()))
    results = (torch.tensor(values).float() for values in (clean, corrupted, patched))
    first, second, third = results
    return Patching(first, second, third.T.contiguous(), tuple(what), identity(model))


def _of_layers(
    names: Sequence[str], kept: Mapping[str, Tensor], masks: Mapping[str, Tensor]
) -> dict[tuple[str, int], Hooks]:
    """Hooks by modality and layer, which put in the residual stream."""

    def put(name: str, mask: Tensor) -> Hooks:
        return [(name, lambda x, hook: torch.where(mask.to(x.device)[..., None], kept[name], x))]

    return {
        (modality, layer): put(name, mask)
        for modality, mask in masks.items()
        for layer, name in enumerate(names)
    }


def _of_sets(
    names: Sequence[str], kept: Mapping[str, Tensor], sets: Mapping[str, NeuronSet]
) -> dict[tuple[str, int], Hooks]:
    """Hooks by set, which put in its neurons' X in every layer."""

    def put(name: str, mask: Tensor) -> tuple[str, Callable[..., Tensor]]:
        return name, lambda x, hook: torch.where(mask.to(x.device), kept[name], x)

    return {
        (key, -1): [put(names[layer], neurons.mask[layer]) for layer in neurons.by_layer()]
        for key, neurons in sets.items()
    }


def _prepared(
    model: Any, one: Sample, other: Sample
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Tensor]]:
    """Model inputs of both prompts, and where in both each modality is."""
    given, against = (model_inputs(model, sample.messages) for sample in (one, other))
    known = layout(model)
    masks, others = (known.masks(inputs["input"]) for inputs in (given, against))
    if any(masks[name].shape != others[name].shape for name in masks) or any(
        not torch.equal(masks[name], others[name]) for name in masks
    ):
        raise ValueError(
            f"The prompts of {one.id or 'a sample'} and {other.id or 'its counterfactual'} do not "
            f"have their modalities in the same places ({given['input'].shape[1]} and "
            f"{against['input'].shape[1]} tokens), so nothing can be put from one into the other."
        )
    own = {name: masks[name] for name in ("text", "special", *known.media)}
    last = torch.zeros_like(masks["text"])
    last[:, -1] = True
    return given, against, {name: mask for name, mask in own.items() if mask.any()} | {LAST: last}


def _answers(model: Any, one: Sample, other: Sample) -> tuple[int, int]:
    """The first token of each one's answer."""
    tokens = []
    for sample in (one, other):
        answer = sample.answers[0] if sample.answers else ""
        found = tokenizer_of(model)(answer, add_special_tokens=False)["input_ids"] if answer else []
        if not found:
            raise ValueError(f"{sample.id or 'A sample'} has no answer to compare logits of.")
        tokens.append(int(found[0]))
    if tokens[0] == tokens[1]:
        raise ValueError(
            f"The answers of {one.id or 'a sample'} and {other.id or 'its counterfactual'} begin "
            "with the same token, so their logits do not differ."
        )
    return tokens[0], tokens[1]


def _difference(model: Any, given: dict[str, Any], hooks: Any, asked: tuple[int, int]) -> float:
    logits = model.run_with_hooks(**given, fwd_hooks=hooks)[0, -1].double()
    return float(logits[asked[0]] - logits[asked[1]])


def _share(back: Any, whole: Any, axis: int = -1) -> Any:
    """The ratio of two means; 0 where there is nothing to restore."""
    below = np.mean(whole, axis=axis)
    return np.mean(back, axis=axis) / np.where(np.abs(below) > 1e-12, below, np.inf)


def _words(sample: Sample) -> str:
    """All that is said in a conversation, without its media."""
    said = []
    for message in sample.messages:
        content = message["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        said.append([(part["type"], part.get("text", "")) for part in parts])
    return repr(said)

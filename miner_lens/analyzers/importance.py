"""MINER's importance scores as an analyzer: stages 1 to 3 in one streaming pass."""

from __future__ import annotations

import importlib.metadata
import math
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from miner_lens.analyzers.passes import Pass, PromptPass, TowerPass
from miner_lens.data.sample import SampleError
from miner_lens.models import sites
from miner_lens.models.identity import ModelIdentity
from miner_lens.models.loading import hf_model_of, identity, layout, prepare
from miner_lens.running.run import Batch, BatchSize, Data, Hook, OnError, State, run
from miner_lens.scoring.scores import ImportanceScores

AttentionMode = Literal["bidirectional", "causal"]


class ImportanceAnalyzer:
    """Scores every neuron of a site by modality (MINER, stages 1 to 3).

    Args:
        attention: Which attention weighs the tokens: `"bidirectional"`, the head mean of
            softmax(QK^T / sqrt d) without a causal mask, as the published code computes it, or
            `"causal"`, the pattern that the model really has.
        data: A name of the data set, kept with the scores.
        site: Where the neurons live: `"llm"`, or a tower of the model, `"vision"`, `"audio"` or
            `"projector"`, in which only the tower's own modalities occur. A tower attends without
            a causal mask, and each image, frame of a video or clip only to itself.
    """

    def __init__(
        self,
        attention: AttentionMode = "bidirectional",
        data: str | None = None,
        site: str = "llm",
    ) -> None:
        if attention not in ("bidirectional", "causal"):
            raise ValueError(f"attention must be 'bidirectional' or 'causal', not {attention!r}.")
        self.attention = attention
        self.data = data
        self.site = site
        self.identity: ModelIdentity | None = None
        self.modalities: tuple[str, ...] = ()
        self._samples = 0
        self._skipped = 0
        self._occurrences: dict[str, int] = {}
        self._scores: dict[str, Tensor] = {}
        self._means: dict[str, Tensor] = {}
        self._pass: Pass | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """What two analyzers must share to be merged or continued."""
        return {"attention": self.attention, "site": self.site}

    def hooks(self, model: Any, batch: Batch | None = None) -> list[Hook]:
        """Hooks on Q, K and X of every layer; see `Analyzer.hooks`."""
        prepare(model)
        if batch is None or self.identity is None:
            self.begin(model)
        assert self.identity is not None
        if batch is None:
            return self._plain_hooks(model)
        reading = self._reading(model)
        if isinstance(reading, TowerPass):
            try:
                reading.begin(batch.inputs, len(batch.ids))
            except ValueError as error:
                raise SampleError(f"{', '.join(batch.ids)}: {error}") from error
        else:
            reading.begin(batch.masks, batch.real)
        self._pass = reading
        return reading.hooks(self.identity.layers)

    def _reading(self, model: Any) -> PromptPass | TowerPass:
        site = sites.find(hf_model_of(model), self.site)
        if isinstance(site, sites.Tower):
            return TowerPass(site, hf_model_of(model))
        return PromptPass({}, torch.empty(0), self.attention == "causal")

    def _plain_hooks(self, model: Any) -> list[Hook]:
        """Hooks for `run_with_hooks`; they read masks off the ids and pass decoding steps by."""
        known = layout(model)
        inputs = model._miner_lens_inputs
        reading = self._reading(model)
        batches: list[Batch] = []

        def begin(ids: Tensor, hook: Any) -> None:
            real = torch.ones_like(ids, dtype=torch.bool) if inputs.real is None else inputs.real
            masks = known.masks(ids, real)
            batches[:] = [Batch({"input_ids": ids}, masks, tuple(map(str, range(len(ids)))))]
            if isinstance(reading, TowerPass):
                reading.begin(inputs.all, len(ids))
                reading.decoding = _continues(inputs.all)
            else:
                reading.begin(masks, real)
            self._pass = reading

        def end(residual: Tensor, hook: Any) -> None:
            if reading.decoding:
                return
            self.check(batches[0])
            self.update(batches[0])
            if isinstance(reading, TowerPass):
                reading.begin(None, 0)

        assert self.identity is not None
        inner = reading.hooks(self.identity.layers)
        return [("embed.hook_in", begin), *inner, ("ln_final.hook_out", end)]

    def begin(self, model: Any) -> None:
        """Note the model; refuse another one than before, or one whose pattern is not computed.

        Raises:
            ValueError: For causal attention, the model's own pattern has a sliding window, a soft
                cap or another scale.
        """
        self._remember(identity(model, self.site))
        if self.site == "llm" and self.attention == "causal":
            _require_plain_attention(model)

    def check(self, batch: Batch) -> None:
        """Raise `SampleError` naming layer and sample where an activation is NaN or infinite."""
        seen = self._seen()
        if isinstance(seen, TowerPass):
            seen.finish()
        # The layers of a model may lie on several devices; only the last step waits for them.
        finite = torch.stack([rows.to(seen.finite[0].device) for rows in seen.finite]).cpu()
        if bool(finite.all()):
            return
        layer, row = (~finite).nonzero()[0].tolist()
        where = f"layer {layer}" if self.site == "llm" else f"layer {layer} of site {self.site!r}"
        raise SampleError(
            f"{batch.ids[row]}: NaN or infinite activations in {where}. Load the model in a "
            "wider dtype (float32 or bfloat16 rather than float16), or leave the sample out with "
            "on_error='skip'."
        )

    def update(self, batch: Batch) -> None:
        """Add the scores of this batch's samples to the sums."""
        seen = self._seen()
        self._samples += len(batch.ids)
        present = seen.present()
        for index, modality in enumerate(seen.modalities):
            # The layers of a model may lie on several devices; the sums lie on the first's.
            device = seen.scores[0].device
            scores = torch.stack([layer[:, index].to(device) for layer in seen.scores], 1)
            means = torch.stack([layer[index].to(device) for layer in seen.means])
            self._add(modality, _wide(scores), _wide(means), present[index])
        self._pass = None

    def skip(self, samples: int) -> None:
        """Count samples that could not be used."""
        self._skipped += samples

    def merge(self, other: ImportanceAnalyzer) -> ImportanceAnalyzer:
        """What both have seen together."""
        if self.site != other.site:
            raise ValueError(
                f"Cannot merge scores of site {self.site!r} with scores of site {other.site!r}."
            )
        if self.attention != other.attention:
            raise ValueError(
                f"Cannot merge scores under {self.attention} attention with scores under "
                f"{other.attention} attention."
            )
        merged = ImportanceAnalyzer(self.attention, self.data, self.site)
        for part in (self, other):
            if part.identity is not None:
                merged._remember(part.identity)
            merged._samples += part._samples
            merged._skipped += part._skipped
            for modality in part.modalities:
                merged._add(
                    modality,
                    part._scores[modality].clone(),
                    part._means[modality].clone(),
                    part._occurrences[modality],
                )
        return merged

    def state(self) -> State:
        """Sums of scores and of means by modality, with the counts that they are sums over."""
        state = {
            "samples": torch.tensor(self._samples),
            "skipped": torch.tensor(self._skipped),
            "causal": torch.tensor(self.attention == "causal"),
        }
        for index, modality in enumerate(self.modalities):
            # The number keeps the order of modalities, which files do not.
            name = f"{index:03}.{modality}"
            state[f"{name}.scores"] = self._scores[modality].clone()
            state[f"{name}.means"] = self._means[modality].clone()
            state[f"{name}.occurrences"] = torch.tensor(self._occurrences[modality])
        return state

    def restore(self, state: State) -> None:
        """Continue from what `state` returned.

        Raises:
            ValueError: The state was made under the other kind of attention.
        """
        if bool(state["causal"]) != (self.attention == "causal"):
            raise ValueError(f"The state is not of scores under {self.attention} attention.")
        self._samples = int(state["samples"])
        self._skipped = int(state["skipped"])
        self.modalities = ()
        names = (key.removesuffix(".scores") for key in sorted(state) if key.endswith(".scores"))
        for name in names:
            parts = (state[f"{name}.{part}"].clone() for part in ("scores", "means", "occurrences"))
            scores, means, occurrences = parts
            self._add(name.partition(".")[2], scores, means, int(occurrences))

    def result(self) -> ImportanceScores:
        """The mean over samples, in which an absent modality counts as 0."""
        if self._samples == 0:
            raise ValueError("No sample has been seen, so there are no scores.")
        scores = [self._scores[modality] / self._samples for modality in self.modalities]
        means = [
            self._means[modality] / max(1, self._occurrences[modality])
            for modality in self.modalities
        ]
        return ImportanceScores(
            torch.stack(scores, dim=1).float().cpu(),
            self.modalities,
            samples=self._samples,
            occurrences=tuple(self._occurrences[modality] for modality in self.modalities),
            skipped=self._skipped,
            means=torch.stack(means).float().cpu(),
            identity=self.identity,
            info={"attention": self.attention, "data": self.data, "versions": _versions()},
        )

    def _remember(self, model: ModelIdentity) -> None:
        if self.identity is not None:
            self.identity.check(model)
        self.identity = model

    def _seen(self) -> Pass:
        if self._pass is None or not (self._pass.scores or isinstance(self._pass, TowerPass)):
            raise RuntimeError("The hooks have seen no forward pass since the last update.")
        return self._pass

    def _add(self, modality: str, scores: Tensor, means: Tensor, occurrences: int) -> None:
        if modality not in self.modalities:
            self.modalities = (*self.modalities, modality)
            self._scores[modality] = scores
            self._means[modality] = means
            self._occurrences[modality] = occurrences
        else:
            # Restored sums lie on the CPU at first.
            self._scores[modality] = self._scores[modality].to(scores.device) + scores
            self._means[modality] = self._means[modality].to(means.device) + means
            self._occurrences[modality] += occurrences


def mine(
    model: Any,
    data: Data,
    attention: AttentionMode = "bidirectional",
    batch_size: BatchSize = 1,
    limit: int | None = None,
    on_error: OnError = "raise",
    progress: bool = True,
    checkpoint: str | Path | None = None,
    checkpoint_every: float = 60.0,
    checkpoint_every_samples: int | None = None,
    site: str = "llm",
) -> ImportanceScores:
    """Score every neuron by how much each modality's tokens drive it.

    It is `run` with one `ImportanceAnalyzer`; all arguments are theirs.

    Args:
        model: A `TransformerBridge`, from `ml.load`, `ml.wrap` or TransformerLens itself.
        data: Samples, or prepared pairs `(model_inputs, masks)`.
        attention: `"bidirectional"`, as published, or `"causal"`, as the model attends.
        batch_size: Samples in one forward pass, or `"auto"`; changes speed, not results.
        limit: Stop after this many samples.
        on_error: `"raise"` or `"skip"` samples that cannot be used.
        progress: Whether to show a progress bar.
        checkpoint: A folder from which a run that was stopped continues.
        checkpoint_every: Seconds between two writes to it.
        checkpoint_every_samples: Write also after so many samples of a process.
        site: Where the neurons live: `"llm"`, `"vision"`, `"audio"` or `"projector"`, as far as
            the model has them. For several in one pass, give `run` an `ImportanceAnalyzer` each.

    Returns:
        Scores [metric modality layer neuron], each in 0 to 1; with several processes, None on
        all but rank 0.
    """
    analyzer = ImportanceAnalyzer(attention, getattr(data, "name", None), site)
    scores: ImportanceScores = run(
        model,
        data,
        analyzer,
        batch_size=batch_size,
        limit=limit,
        on_error=on_error,
        progress=progress,
        checkpoint=checkpoint,
        checkpoint_every=checkpoint_every,
        checkpoint_every_samples=checkpoint_every_samples,
    )
    return scores


def _require_plain_attention(model: Any) -> None:
    """Refuse patterns other than softmax(QK^T / sqrt d) over all earlier tokens."""
    for layer, block in enumerate(model.blocks):
        attention = getattr(block.attn, "original_component", None) or block.attn
        width: Any = getattr(attention, "head_dim", None)
        scale: Any = getattr(attention, "scaling", None)
        # Some families keep the window on each layer, where it may be off, others in the config.
        held_by = (
            attention
            if hasattr(attention, "sliding_window")
            else getattr(attention, "config", None)
        )
        window = getattr(held_by, "sliding_window", None)
        other = {
            "a sliding window": window is not None,
            "a soft cap": getattr(attention, "attn_logit_softcapping", None) is not None,
            "another scale": None not in (width, scale)
            and not math.isclose(scale, width**-0.5, rel_tol=1e-6),
        }
        found = [name for name, present in other.items() if present]
        if found:
            raise ValueError(
                f"attention='causal' scores plain softmax(QK^T / sqrt d), but layer {layer} of "
                f"this model attends with {' and '.join(found)}. Use attention='bidirectional'."
            )


def _continues(inputs: dict[str, Any]) -> bool:
    """Whether a pass continues an earlier one, as steps of generation do."""
    cache = inputs.get("past_key_values")
    return cache is not None and cache.get_seq_length() > 0


def _wide(tensor: Tensor) -> Tensor:
    """float64 where the device has it, so that sums over many samples stay exact."""
    return tensor if tensor.device.type == "mps" else tensor.double()


def _versions() -> dict[str, str]:
    packages = ("miner-lens", "transformer-lens", "transformers", "torch")
    return {package: importlib.metadata.version(package) for package in packages}

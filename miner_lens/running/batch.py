"""What one forward pass is about, in the decoder and in a tower."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from miner_lens.data.sample import SampleError
from miner_lens.models import sites
from miner_lens.models.generation import Inputs
from miner_lens.models.modality import Masks, parts_of
from miner_lens.models.pass_inputs import PassInputs
from miner_lens.models.sites import Call, Tower

T = TypeVar("T")


@dataclass(frozen=True)
class Batch:
    """What one forward pass is about.

    Attributes:
        inputs: Keyword arguments of the Hugging Face model, on its device.
        masks: The tokens of each modality, [sample pos] each; padding belongs to none.
        ids: A name for each sample, for error messages.
        samples: The `Sample`s, where the data are such.
        index: The place of each sample in the data; row r of a prepared pair counts r * 2**40 more.
        answers: The tokens of each sample's answer, where they follow the prompt. They are part of
            no modality: what is generated is not scored.
        tails: How many tokens follow each prompt: the answer, and what opens a turn for it.
    """

    inputs: Inputs
    masks: Masks
    ids: tuple[str, ...]
    samples: tuple[Any, ...] = ()
    index: tuple[int, ...] = ()
    answers: tuple[tuple[int, ...], ...] = ()
    tails: tuple[int, ...] = ()
    _made: dict[Hashable, Any] = field(default_factory=dict, repr=False)

    @cached_property
    def real(self) -> Bool[Tensor, "batch pos"]:
        """The tokens that are neither padding nor the answer's."""
        return prompt_of(self.inputs, self.tails)

    @cached_property
    def padding(self) -> Bool[Tensor, "batch pos"] | None:
        """`real`, or None where nothing is padded. Asked once a pass, as it waits for a device."""
        return None if bool(self.real.all()) else self.real

    @property
    def labels(self) -> tuple[str | None, ...]:
        """The label of each sample."""
        return tuple(getattr(sample, "label", None) for sample in self.samples)

    @cached_property
    def places(self) -> Int[Tensor, "batch pos 2"]:
        """(place in the data, position among the sample's real tokens) of each token."""
        index = torch.tensor(self.index, device=self.real.device)
        position = self.real.long().cumsum(1) - 1
        return torch.stack([index[:, None].expand_as(position), position], -1)

    @cached_property
    def present(self) -> dict[str, Tensor]:
        """In how many samples each modality occurs."""
        return dict(zip(self.masks, self.stacked.any(2).sum(0), strict=True))

    @cached_property
    def stacked(self) -> Bool[Tensor, "batch modality pos"]:
        """All masks in one tensor."""
        return torch.stack(list(self.masks.values()), dim=1)

    @cached_property
    def parts(self) -> list[tuple[int, ...]]:
        """Which modalities each is made of; see `miner_lens.models.modality.parts_of`."""
        return parts_of(self.masks)

    def once(self, key: Hashable, make: Callable[[], T]) -> T:
        """What `make` returned when it was first asked for under this key in this pass."""
        if key not in self._made:
            self._made[key] = make()
        made: T = self._made[key]
        return made

    @property
    def output(self) -> Any:
        """What the model returned, when the pass is over.

        Its `logits` are [sample pos vocab] where an analyzer of the run sets `needs_logits`, and
        of the last position alone otherwise.
        """
        if "output" not in self._made:
            raise RuntimeError("batch.output is there when the pass is over: use it in finish.")
        return self._made["output"]

    @property
    def towers(self) -> dict[str, TowerPass]:
        """The towers that were asked about in this pass, by site."""
        return self.once("towers", dict)


def prompt_of(inputs: Inputs, tails: Sequence[int] = ()) -> Bool[Tensor, "batch pos"]:
    """Return which tokens are of prompts, which are padded on the left and may have tails."""
    ids, mask = inputs["input_ids"], inputs.get("attention_mask")
    real = (torch.ones_like(ids) if mask is None else mask).to(torch.bool, copy=True)
    for row, tail in zip(real, tails, strict=False):
        row[len(row) - tail :] = False
    return real


@dataclass(frozen=True)
class TowerBatch(Batch):
    """What one call of a tower is about; positions are a sample's rows, and its mask the real ones.

    Attributes:
        whole: The batch of the whole pass.
        rows: What the rows of the call's heap are.
        spans: (sample, first row, row after the last) in the call's heap of rows.
        call: Which call of the tower in this pass it is.
    """

    whole: Any = None
    rows: Any = None
    spans: tuple[tuple[int, int, int], ...] = ()
    call: int = 0

    @cached_property
    def real(self) -> Bool[Tensor, "batch pos"]:
        """The rows that are not padding."""
        return next(iter(self.masks.values()))


class TowerPass:
    """A tower's calls in one forward pass, and whose their rows are.

    A tower is called once for each modality, each time with the items of all samples in one heap
    of rows; here a sample's rows are put together. Until it is closed it sees what the tower's
    calls are told.

    Attributes:
        modalities: What each call is about.
    """

    def __init__(self, tower: Tower, hf_model: Any, batch: Batch) -> None:
        self.tower, self.batch, self._hf_model = tower, batch, hf_model
        self.modalities = tower.media(batch.inputs)
        self._told = PassInputs()
        for module in tower.told(hf_model):
            self._told.watch_calls(module)
        self._calls: dict[int, Call] = {}

    @classmethod
    def of(cls, batch: Batch, hf_model: Any, site: str) -> TowerPass:
        """The one of this pass, made when it is first asked for."""
        if site not in batch.towers:
            tower: Any = sites.find(hf_model, site)
            batch.towers[site] = cls(tower, hf_model, batch)
        return batch.towers[site]

    def close(self) -> None:
        """See no more calls."""
        self._told.stop()

    @property
    def present(self) -> dict[str, int]:
        """How many samples have items of each of the tower's modalities."""
        counts = {
            modality: len(set(self._calls[call].samples))
            for call, modality in enumerate(self.modalities)
        }
        return {name: counts.get(name, 0) for name in self.tower.modalities}

    def view(self, call: int, x: Tensor) -> TowerBatch:
        """The batch of a call, with its mask on a device; made once a call, not in each layer.

        Args:
            call: Which call of the tower in this pass it is.
            x: What passes through a point; the mask is wanted on its device. The first time is
                while the call is running.

        Raises:
            RuntimeError: The tower ran more often than its inputs say.
            SampleError: So many rows cannot be told apart.
        """
        if call >= len(self.modalities):
            times = len(self.modalities)
            raise RuntimeError(
                f"The {self.tower.name} tower ran more than {times} times in a pass."
            )
        whole, modality = self.batch, self.modalities[call]
        shape = x.shape

        def make() -> TowerBatch:
            running = self._told.running
            calls = [] if running is None else [told.arguments for told in running.calls]
            try:
                found = self.tower.call(self._hf_model, whole.inputs, modality, calls, shape)
            except ValueError as error:
                raise SampleError(f"{', '.join(whole.ids)}: {error}") from error
            self._calls[call] = found
            spans = tuple(found.spans)
            longest = max(stop - start for _, start, stop in spans)
            real = torch.zeros(len(whole.ids), longest, dtype=torch.bool)
            for sample, start, stop in spans:
                real[sample, : stop - start] = found.rows.real[start:stop]
            described = (whole.inputs, {modality: real.to(x.device)}, whole.ids, whole.samples)
            return TowerBatch(
                *described, whole.index, whole=whole, rows=found.rows, spans=spans, call=call
            )

        # Layers may have other numbers of rows, as where patches are merged on the way.
        return whole.once(("view", self.tower.name, call, shape[:-1], x.device), make)

    def padded(self, x: Tensor, call: int) -> tuple[Tensor, TowerBatch]:
        """Each sample's rows of a call, [sample pos ...], zero where padded, and their batch."""
        view, heap = self.view(call, x), x.flatten(0, -2)
        if len(view.ids) == 1:
            ((_, start, stop),) = view.spans
            return heap[None, start:stop], view
        laid = heap.new_zeros(*view.real.shape, heap.shape[-1])
        for sample, start, stop in view.spans:
            laid[sample, : stop - start] = heap[start:stop]
        return laid, view

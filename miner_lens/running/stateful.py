"""What an analyzer has seen: state by name, and how often what occurred."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from miner_lens.running.totals import Keep, Max, Min, Sum, Top, Total, Totals

State = dict[str, Tensor]

REASONS = 5  # why the first samples were skipped


class Mergeable(Protocol):
    """State that is written, sent and merged as tensors by name."""

    def state_dict(self) -> State:
        """Everything that it holds."""

    def load_state_dict(self, state: State) -> None:
        """Hold what `state_dict` returned, and nothing else."""

    def merge_state_dict(self, state: State) -> None:
        """Add what another one holds."""


class Together:
    """Several of them as one, whose tensors are under `number/name`."""

    def __init__(self, each: Sequence[Mergeable]) -> None:
        self._each = each

    def state_dict(self) -> State:
        """What all of them hold."""
        held = (one.state_dict().items() for one in self._each)
        return {f"{number}/{name}": t for number, one in enumerate(held) for name, t in one}

    def load_state_dict(self, state: State) -> None:
        """Hold what `state_dict` returned, and nothing else."""
        for one, own in zip(self._each, self._apart(state), strict=True):
            one.load_state_dict(own)

    def merge_state_dict(self, state: State) -> None:
        """Add what as many others hold."""
        for one, own in zip(self._each, self._apart(state), strict=True):
            one.merge_state_dict(own)

    def _apart(self, state: State) -> list[State]:
        states: list[State] = [{} for _ in self._each]
        for key, tensor in state.items():
            number, _, name = key.partition("/")
            states[int(number)][name] = tensor
        return states


class Stateful:
    """State that `see` names and `result` reads, and counts of samples, modalities and labels.

    What a pass adds to the state is held back until `fold`.
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Make its state, so that a subclass's `__init__` need not call another."""
        self = super().__new__(cls)
        self._totals, self._counts = Totals(), Totals()
        self._index = torch.zeros(0, dtype=torch.long)
        return self

    def sum(self, name: str, value: Tensor | float, at: int | None = None) -> None:
        """Add to a sum, in float64, or in int64 for whole numbers.

        Args:
            name: Of the state.
            value: Of any shape, the same each time.
            at: A place on the first axis of the state, such as `point.layer`.
        """
        self._totals.add(name, Sum({"value": torch.as_tensor(value).detach()}), at)

    def max(self, name: str, value: Tensor | float, at: int | None = None) -> None:
        """Keep the larger of each element; see `sum`."""
        self._totals.add(name, Max({"value": _floating(value)}), at)

    def min(self, name: str, value: Tensor | float, at: int | None = None) -> None:
        """Keep the smaller of each element; see `sum`."""
        self._totals.add(name, Min({"value": _floating(value)}), at)

    def top(self, name: str, values: Tensor, ids: Tensor, k: int, at: int | None = None) -> None:
        """Keep the k largest values of each cell, with the ids of what had them.

        `self[name]` has `values` [k *cell], falling, and `ids` [k *cell part].

        Args:
            name: Of the state.
            values: [candidate *cell], such as `x[mask]`, [token neuron]; compared in float32.
            ids: Whole numbers for each candidate, [candidate] or [candidate part], such as
                `batch.places[mask]`, or for each of its cells, [candidate *cell part]. Which
                of equal values stay is drawn from their ids.
            k: How many to keep; where there are fewer, the rest is -inf, with ids -1.
            at: A place on the first axis of the state, such as `point.layer`.
        """
        self._totals.add(name, Top.of(values, ids, k), at)

    def keep(
        self, name: str, rows: Tensor, at_most: int, seed: int = 0, ids: Tensor | None = None
    ) -> None:
        """Keep a random sample of rows, the same however the data are dealt to processes.

        `self[name]` is [row ...].

        Args:
            name: Of the state.
            rows: [row ...]: one for each sample of the batch, or with ids.
            at_most: How many to keep.
            seed: Of the draw.
            ids: Whole numbers that are each row's alone, [row] or [row part], such as
                `batch.places[mask]`; left out, rows are the batch's samples.

        Raises:
            ValueError: Rows without ids are not one for each sample.
        """
        if ids is None:
            ids = self._index
            if len(ids) != len(rows):
                raise ValueError(
                    f"keep({name!r}) was given {len(rows)} rows for {len(ids)} samples and no ids. "
                    "Give ids that are each row's alone, such as batch.places[mask]."
                )
        self._totals.add(name, Keep.of(rows, ids, at_most, seed))

    def __getitem__(self, name: str) -> Any:
        if name not in self:
            known = ", ".join(self._totals.named) or "nothing yet, as no sample has been seen"
            raise KeyError(f"There is no state {name!r}; there is {known}.")
        return self._totals.named[name].value

    def __contains__(self, name: str) -> bool:
        return name in self._totals.named

    @property
    def samples(self) -> int:
        """How many samples it has seen."""
        return self._counted("samples").get("", 0)

    @property
    def skipped(self) -> int:
        """How many could not be used."""
        return sum(self._counted("skipped").values())

    @property
    def reasons(self) -> tuple[str, ...]:
        """Why the first of them could not be used."""
        return tuple(filter(None, self._counted("skipped")))

    @property
    def occurrences(self) -> dict[str, int]:
        """In how many samples each modality occurred that the data know of."""
        return self._counted("modality")

    @property
    def modalities(self) -> tuple[str, ...]:
        """The modalities that occurred in any sample."""
        return tuple(name for name, count in self.occurrences.items() if count)

    @property
    def labels(self) -> tuple[str, ...]:
        """The labels that occurred, in alphabetical order."""
        return tuple(sorted(self._counted("label")))

    def forget(self, index: Iterable[int]) -> None:
        """Hold nothing back; the samples of the next pass have these places in the data."""
        self._totals.forget()
        self._index = torch.tensor(list(index))

    def added(self) -> dict[str, Total]:
        """What is held back, by name."""
        return self._totals.ready()

    def fold(
        self, samples: int, present: Mapping[str, Tensor | int], labels: Iterable[str | None]
    ) -> None:
        """Keep what was held back; modalities are present in so many of the samples."""
        self._totals.fold()
        self._count("samples/", samples)
        for name, count in present.items():
            self._count(f"modality/{name}", count)
        for label in labels:
            if label is not None:
                self._count(f"label/{label}", 1)

    def skip(self, reason: str) -> None:
        """Count a sample that could not be used; of the first few the reason is kept."""
        kept = reason[:1_000] if len(self.reasons) < REASONS else ""
        self._count(f"skipped/{kept}", 1)

    def state_dict(self) -> State:
        """Everything that was folded, as tensors that `load_state_dict` takes."""
        parts = {"state": self._totals.state_dict(), "counts": self._counts.state_dict()}
        return {f"{part}/{key}": t for part, state in parts.items() for key, t in state.items()}

    def load_state_dict(self, state: State) -> None:
        """Continue from what `state_dict` returned, forgetting what was seen before."""
        self._totals, self._counts = (
            Totals.from_state_dict(
                {key.removeprefix(part): t for key, t in state.items() if key.startswith(part)}
            )
            for part in ("state/", "counts/")
        )

    def add_state(self, other: Stateful) -> None:
        """Add what another one has seen."""
        for own, theirs in ((self._totals, other._totals), (self._counts, other._counts)):
            for name, total in theirs.named.items():
                own.merge(name, total)

    def _count(self, name: str, count: Tensor | int) -> None:
        self._counts.merge(name, Sum({"value": torch.as_tensor(count)}))

    def _counted(self, what: str) -> dict[str, int]:
        return {
            name.removeprefix(f"{what}/"): int(total.value)
            for name, total in self._counts.named.items()
            if name.startswith(f"{what}/")
        }


def _floating(value: Tensor | float) -> Tensor:
    tensor = torch.as_tensor(value).detach()
    return tensor if tensor.is_floating_point() else tensor.double()

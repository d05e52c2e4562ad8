"""What an analyzer is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeVar, runtime_checkable

from torch import Tensor

from miner_lens.running.batches import Batch

Hook = tuple[str, Callable[..., Tensor | None]]
State = dict[str, Tensor]
R = TypeVar("R", covariant=True)
S = TypeVar("S")


@runtime_checkable
class Analyzer(Protocol[R]):
    """Reads hook points during a pass and folds what it sees into a small state.

    `run` calls, for each batch: `hooks` before the forward pass, `check` and `update` after it.
    States merge, so a run can be split over processes or resumed; a new analysis is one class
    with these methods. For merging, an analyzer is copied (`copy.deepcopy`, without the model) and
    the copy restored from another process's state.
    """

    def hooks(self, model: Any, batch: Batch | None = None) -> list[Hook]:
        """Hook functions by hook-point name, for one forward pass of this batch.

        Without a batch the list is for plain TransformerLens, `model.run_with_hooks(tokens,
        fwd_hooks=analyzer.hooks(model))`, and folds by itself at the end of the pass.
        """
        ...

    def check(self, batch: Batch) -> None:
        """Raise `SampleError` if what the hooks saw must not be folded.

        All analyzers check before any updates, so that they count the same samples.
        """
        ...

    def update(self, batch: Batch) -> None:
        """Fold what the hooks saw of this batch into the state."""
        ...

    def merge(self: S, other: S) -> S:
        """A new analyzer that has seen what both have seen."""
        ...

    def state(self) -> State:
        """Everything that was folded, as tensors that `restore` takes."""
        ...

    def restore(self, state: State) -> None:
        """Continue from what `state` returned, forgetting what was seen before."""
        ...

    def result(self) -> R:
        """What was found."""
        ...


@runtime_checkable
class KnowsModel(Protocol):
    """An analyzer that wants to know the model before the first batch."""

    def begin(self, model: Any) -> None:
        """Note the model that is about to run."""
        ...


@runtime_checkable
class CountsSkipped(Protocol):
    """An analyzer that keeps count of the samples that `run` skipped."""

    def skip(self, samples: int) -> None:
        """Count samples that could not be used."""
        ...

"""One pass over the data, with any number of analyzers reading along."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar, runtime_checkable

import torch
from jaxtyping import Bool
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
)
from rich.text import Text
from torch import Tensor

from miner_lens import attention
from miner_lens.checkpoint import Checkpoint
from miner_lens.generation import Inputs, prepare_inputs, to_device
from miner_lens.modality import Masks
from miner_lens.models import hf_model_of, identity, is_bridge, layout, prepare
from miner_lens.sample import Sample, SampleError

Hook = tuple[str, Callable[..., Tensor | None]]
Prepared = tuple[Inputs, Masks]
Data = Iterable[Sample] | Iterable[Prepared]
OnError = Literal["raise", "skip"]
State = dict[str, Tensor]
R = TypeVar("R", covariant=True)
S = TypeVar("S")


@dataclass(frozen=True)
class Batch:
    """What one forward pass is about.

    Attributes:
        inputs: Keyword arguments of the Hugging Face model, on its device.
        masks: The tokens of each modality, [batch pos] each; padding belongs to none.
        ids: A name for each sample, for error messages.
    """

    inputs: Inputs
    masks: Masks
    ids: tuple[str, ...]

    @property
    def real(self) -> Bool[Tensor, "batch pos"]:
        """The tokens that are not padding."""
        mask = self.inputs.get("attention_mask")
        if mask is not None:
            real: Tensor = mask.to(torch.bool)
            return real
        return torch.ones_like(self.inputs["input_ids"], dtype=torch.bool)


@runtime_checkable
class Analyzer(Protocol[R]):
    """Reads hook points during a pass and folds what it sees into a small state.

    `run` calls, for each batch: `hooks` before the forward pass, `check` and `update` after it.
    States merge, so a run can be split over processes or resumed; a new analysis is one class
    with these methods.
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
        """Continue from what `state` returned."""
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


def run(
    model: Any,
    data: Data,
    *analyzers: Analyzer[Any],
    batch_size: int = 1,
    limit: int | None = None,
    on_error: OnError = "raise",
    progress: bool = True,
    checkpoint: str | Path | None = None,
    checkpoint_every: float = 60.0,
) -> Any:
    """Show every sample to the model once, prefill only, with all analyzers reading along.

    Nothing is kept from sample to sample but the analyzers' states.

    Args:
        model: A `TransformerBridge`.
        data: Samples, or prepared pairs `(model_inputs, masks)` with
            `masks: {modality: Bool[batch pos]}`.
        analyzers: At least one; they share each forward pass.
        batch_size: Samples in one forward pass. Changes speed, not results. Prepared pairs are
            passed on as they are.
        limit: Stop after this many samples (or pairs).
        on_error: What to do with a sample that cannot be read or gives NaN or infinite
            activations: raise `SampleError`, or skip and count it.
        progress: Whether to show a progress bar with samples per second.
        checkpoint: A folder in which to keep the analyzers' states. Called again with the same
            model, data and settings, a run that was stopped, also by SIGKILL, continues from the
            last write; its result is the one of an uninterrupted run, bit for bit.
        checkpoint_every: Seconds between two writes.

    Returns:
        The analyzer's result, or a tuple of results where there are several.

    Raises:
        ValueError: No data, no usable sample, no analyzer, not a bridge, or a checkpoint of
            another run.
        SampleError: A sample is unusable and `on_error="raise"`.
    """
    _check_arguments(model, analyzers, batch_size, on_error)
    prepare(model)
    for analyzer in analyzers:
        if isinstance(analyzer, KnowsModel):
            analyzer.begin(model)
    items = iter(data if limit is None else islice(data, limit))
    seen = skipped = 0
    keeper = None
    if checkpoint is not None:
        settings = _settings(model, analyzers, batch_size, on_error)
        keeper = Checkpoint(checkpoint, checkpoint_every, settings)
        seen = keeper.restore(analyzers)
        if seen:
            keeper.pass_over(islice(items, seen))
        skipped = keeper.skipped
    with _evaluating(model), _Bar(progress, _length(data, limit)) as bar:
        bar.advance(seen, skipped)
        for group in _groups(items, batch_size):
            failures = _pass(model, group, seen, analyzers, on_error)
            seen += len(group)
            skipped += failures
            bar.advance(len(group), skipped)
            for analyzer in analyzers if failures else ():
                if isinstance(analyzer, CountsSkipped):
                    analyzer.skip(failures)
            if keeper is not None:
                keeper.update(group, failures, analyzers)
    if keeper is not None:
        keeper.write(analyzers)
    if seen == 0:
        raise ValueError("There is no data: the iterable of samples is empty.")
    if skipped == seen:
        raise ValueError(f"None of the {seen} samples could be used; all were skipped.")
    results = tuple(analyzer.result() for analyzer in analyzers)
    return results[0] if len(results) == 1 else results


def _settings(
    model: Any, analyzers: tuple[Any, ...], batch_size: int, on_error: str
) -> dict[str, Any]:
    """What must be the same when a run is continued."""
    kinds = [[type(one).__name__, getattr(one, "settings", {})] for one in analyzers]
    who = identity(model).to_dict()
    return {"model": who, "analyzers": kinds, "batch_size": batch_size, "on_error": on_error}


def _check_arguments(
    model: Any, analyzers: tuple[Any, ...], batch_size: int, on_error: str
) -> None:
    if not is_bridge(model):
        raise ValueError(
            f"run needs a TransformerBridge, got {type(model).__name__}: use ml.wrap(model)."
        )
    if not analyzers:
        raise ValueError("run needs at least one analyzer, such as ml.ImportanceAnalyzer().")
    if len({id(analyzer) for analyzer in analyzers}) < len(analyzers):
        raise ValueError("An analyzer was given twice; each keeps its own state.")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, not {batch_size}.")
    if on_error not in ("raise", "skip"):
        raise ValueError(f"on_error must be 'raise' or 'skip', not {on_error!r}.")


def _pass(
    model: Any,
    group: list[Any],
    start: int,
    analyzers: tuple[Analyzer[Any], ...],
    on_error: OnError,
) -> int:
    """Run one group of samples; where that fails and may, run them one by one.

    Returns how many samples were skipped.
    """
    try:
        batch = _batch(model, group, start)
        _forward(model, batch, analyzers)
        for analyzer in analyzers:
            analyzer.check(batch)
    except SampleError:
        if on_error == "raise":
            raise
        if len(group) == 1:
            return 1
        return sum(
            _pass(model, [item], start + index, analyzers, on_error)
            for index, item in enumerate(group)
        )
    for analyzer in analyzers:
        analyzer.update(batch)
    return 0


def _forward(model: Any, batch: Batch, analyzers: tuple[Analyzer[Any], ...]) -> None:
    hf_model = hf_model_of(model)
    hooks = [hook for analyzer in analyzers for hook in analyzer.hooks(model, batch)]
    options: Inputs = {"use_cache": False}
    if "logits_to_keep" in inspect.signature(hf_model.forward).parameters:
        options["logits_to_keep"] = 1
    try:
        with torch.no_grad(), model.hooks(fwd_hooks=hooks):
            hf_model(**batch.inputs, **options)
    except ValueError as error:
        # Such as fewer placeholders than the media have tokens.
        raise SampleError(f"{', '.join(batch.ids)}: the model refuses it: {error}") from error


def _batch(model: Any, group: list[Any], start: int) -> Batch:
    if isinstance(group[0], Sample):
        ids = tuple(s.id or f"sample {start + i}" for i, s in enumerate(group))
        try:
            inputs = prepare_inputs(model, [sample.messages for sample in group])
        except SampleError as error:
            raise SampleError(f"{', '.join(ids)}: {error}") from error
        masks = layout(model).masks(inputs["input_ids"], inputs.get("attention_mask"))
        return Batch(inputs, masks, ids)
    return _prepared(model, group[0], start)


def _prepared(model: Any, pair: Any, start: int) -> Batch:
    if not (isinstance(pair, tuple | list) and len(pair) == 2):
        raise ValueError(
            "Data must be Samples or pairs (model_inputs, masks); item "
            f"{start} is {type(pair).__name__}."
        )
    device = hf_model_of(model).device
    inputs = to_device(dict(pair[0]), device)
    if "input" in inputs:
        inputs["input_ids"] = inputs.pop("input")
    masks = to_device(dict(pair[1]), device)
    if "input_ids" not in inputs:
        raise ValueError(f"Item {start}: the model inputs have no input_ids.")
    shape = inputs["input_ids"].shape
    for modality, mask in masks.items():
        if mask.shape != shape or mask.dtype != torch.bool:
            raise ValueError(
                f"Item {start}: the mask of {modality!r} must be a boolean tensor of shape "
                f"{tuple(shape)} like input_ids, not {mask.dtype} of shape {tuple(mask.shape)}."
            )
    if not masks:
        raise ValueError(f"Item {start}: masks must name at least one modality.")
    rows = range(shape[0])
    names = (f"sample {start}",) if len(rows) == 1 else (f"sample {start}, row {r}" for r in rows)
    batch = Batch(inputs, masks, tuple(names))
    for modality, mask in masks.items():
        if bool((mask & ~batch.real).any()):
            raise ValueError(f"Item {start}: the mask of {modality!r} marks padding as well.")
    return batch


def _groups(items: Iterator[Any], batch_size: int) -> Iterator[list[Any]]:
    """Up to `batch_size` samples at a time; a prepared pair is a group by itself."""
    group: list[Any] = []
    for item in items:
        if not isinstance(item, Sample):
            yield [item]
            continue
        group.append(item)
        if len(group) == batch_size:
            yield group
            group = []
    if group:
        yield group


def _length(data: Any, limit: int | None) -> int | None:
    try:
        length = len(data)
    except TypeError:
        return limit
    return length if limit is None else min(length, limit)


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    """No dropout, and fused attention; the model's own settings come back afterwards."""
    hf_model = hf_model_of(model)
    training = [module for module in hf_model.modules() if module.training]
    hf_model.eval()
    try:
        with attention.fused(attention.attentions_of(model)):
            yield
    finally:
        for module in training:
            module.training = True


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:.1f} samples/s")


class _Bar:
    """A progress bar with samples per second and the number of skipped samples."""

    def __init__(self, show: bool, total: int | None) -> None:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            _Rate(),
        )
        self._progress = Progress(*columns, disable=not show)
        self._task = self._progress.add_task("samples", total=total)

    def __enter__(self) -> _Bar:
        self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.stop()

    def advance(self, samples: int, skipped: int) -> None:
        description = "samples" if not skipped else f"samples ({skipped} skipped)"
        self._progress.update(self._task, advance=samples, description=description)

"""One pass over the data, with any number of analyzers reading along."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from miner_lens.data.labelled import labelled
from miner_lens.data.sample import Sample
from miner_lens.models.bridge import prepared_bridge
from miner_lens.models.foreign import identified
from miner_lens.models.forward import evaluating
from miner_lens.models.generation import Inputs, input_device
from miner_lens.models.modality import Masks
from miner_lens.running.analyzer import Analyzer
from miner_lens.running.distributed import joined
from miner_lens.running.passes import BatchSize, Objective, OnError, Passes, Sampler
from miner_lens.running.work import Items, work_through

Prepared = tuple[Inputs, Masks]
Data = Iterable[Sample] | Iterable[Prepared] | Mapping[str, Iterable[Sample]]


def run(
    model: Any,
    data: Data,
    *analyzers: Analyzer[Any],
    batch_size: BatchSize = 1,
    limit: int | None = None,
    on_error: OnError = "raise",
    progress: bool = True,
    checkpoint: str | Path | None = None,
    checkpoint_every: float = 60.0,
    checkpoint_every_samples: int | None = None,
    objective: Objective = "answer",
) -> Any:
    """Show every sample to the model once, prefill only, with all analyzers reading along.

    Nothing is kept from sample to sample but the analyzers' states. Samples are prepared while the
    model is busy with those before them, so an iterable is read one batch ahead. Under torchrun,
    accelerate or srun each process takes a share of the data, and all get the result; see
    docs/scaling.md.

    Args:
        model: A `TransformerBridge`.
        data: Samples, or prepared pairs `(model_inputs, masks)` with
            `masks: {modality: Bool[batch pos]}`, or a mapping of names to samples, which are then
            labelled by those names.
        analyzers: At least one; they share each forward pass. With several processes or a
            checkpoint they must be new.
        batch_size: Samples in one forward pass. Changes speed, not results. `"auto"` puts samples
            of like length together, up to a number of tokens that is halved when memory runs out.
            Prepared pairs are passed on as they are.
        limit: So many samples at most, the first ones; a prepared pair counts as one.
        on_error: What to do with a sample that cannot be read or gives NaN or infinite
            activations: raise `SampleError`, or skip and count it.
        progress: Whether to show a progress bar with samples per second.
        checkpoint: A folder in which to keep the analyzers' states. Called again with the same
            model, data and settings, a run that was stopped, also by SIGKILL, continues from the
            last write; its result is the one of an uninterrupted run, bit for bit (of several
            processes, equal to 1e-6). Their number may change; they must share the folder, and no
            other run may use it meanwhile.
        checkpoint_every: Seconds between two writes.
        checkpoint_every_samples: Write also after so many samples of a process.
        objective: What gradients are of, where an analyzer needs them. `"answer"`: the
            log-probability of each sample's first answer, which the model then reads after the
            prompt; what is read at the prompt is the same as without. Or a function of the logits
            [sample pos token] of the prompts and the `Batch`, whose sum counts.

    Returns:
        The analyzer's result, or a tuple of results where there are several.

    Raises:
        ValueError: No usable sample, no analyzer, not a bridge, a checkpoint of another run or one
            that is in use, or processes that differ in model, data or settings.
        SampleError: A sample is unusable and `on_error="raise"`.
        RankError: Another process has stopped.
    """
    _check_arguments(analyzers, batch_size, limit, on_error)
    model = prepared_bridge(model)
    device = input_device(model)
    items = Items(labelled(data) if isinstance(data, Mapping) else data, limit)
    with evaluating(model), joined() as ranks:
        if ranks.world_size > 1 or checkpoint is not None:
            _require_new(analyzers)
        for analyzer in analyzers:
            analyzer.begin(model)
        sampler = Sampler(batch_size, device)
        wanted = objective if any(one.needs_gradients for one in analyzers) else None
        passes = Passes(model, analyzers, on_error, sampler, wanted)
        settings = {
            "analyzers": [[type(one).__name__, one.settings] for one in analyzers],
            "batch_size": batch_size,
            "on_error": on_error,
            "objective": _objective(wanted, checkpoint is not None),
        }
        seen, skipped = work_through(
            ranks,
            model,
            items,
            analyzers,
            sampler,
            prepare=passes.prepare,
            work=passes.run,
            settings=settings,
            checkpoint=checkpoint,
            seconds=checkpoint_every,
            samples=checkpoint_every_samples,
            progress=progress,
        )
        if skipped == seen:
            none = f"None of the {seen} samples could be used; all were skipped."
            raise ValueError(none if seen else "There is no data: the iterable is empty.")
        if skipped and ranks.rank == 0:
            why = "; ".join(analyzers[0].reasons)
            warnings.warn(f"{skipped} of {seen} samples were skipped. {why}", stacklevel=2)
        results = tuple(analyzer.result() for analyzer in analyzers)
    return results[0] if len(results) == 1 else results


def _objective(objective: Any, fully: bool) -> Any:
    return identified(objective, "objective", fully) if callable(objective) else objective


def _require_new(analyzers: tuple[Analyzer[Any], ...]) -> None:
    for analyzer in analyzers:
        if analyzer.samples or analyzer.skipped:
            raise ValueError(
                f"This {type(analyzer).__name__} has seen {analyzer.samples} samples already, and "
                "they would count again: give a new one, and add the two (a + b) afterwards."
            )


def _check_arguments(
    analyzers: tuple[Any, ...], batch_size: BatchSize, limit: int | None, on_error: str
) -> None:
    if not analyzers:
        raise ValueError("run needs at least one analyzer, such as ml.ImportanceAnalyzer().")
    if len({id(analyzer) for analyzer in analyzers}) < len(analyzers):
        raise ValueError("An analyzer was given twice; each keeps its own state.")
    if batch_size != "auto" and (not isinstance(batch_size, int) or batch_size < 1):
        raise ValueError(f"batch_size must be at least 1, or 'auto', not {batch_size!r}.")
    if limit is not None and limit < 1:
        raise ValueError(f"limit is {limit}; give a number of samples, or None for all of them.")
    if on_error not in ("raise", "skip"):
        raise ValueError(f"on_error must be 'raise' or 'skip', not {on_error!r}.")

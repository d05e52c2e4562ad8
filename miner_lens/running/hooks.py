"""The hooks of a pass: what its analyzers read, and what several of them need but once."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any, Protocol

import torch
from torch import Tensor

from miner_lens.data.sample import SampleError
from miner_lens.models.access import layout
from miner_lens.models.bridge import prepare
from miner_lens.models.forward import is_aside
from miner_lens.models.forward_pass import past_length
from miner_lens.models.pass_inputs import pass_inputs
from miner_lens.models.points import Point
from miner_lens.models.precision import full_precision
from miner_lens.running.batch import Batch

Hook = tuple[str, Callable[..., Tensor | None]]
Running = Callable[[], Batch | None]

OUTSIDE = (
    "The {tower} tower ran outside of a forward pass of the whole model, as it does within "
    "generate, so its rows cannot be told apart by sample. Call the model on the prompt instead."
)


class Shared(Protocol, Hashable):
    """Something that several analyzers need of a pass, read by hooks of its own.

    Equal ones are hooked once in each pass; what they read they keep in `batch.once(self, ...)`.
    """

    def hooks(self, model: Any, running: Running) -> list[Hook]:
        """Its hooks; `running` gives the batch of the pass, or None in a step of generation."""
        ...


def pass_hooks(analyzers: Sequence[Any], model: Any, running: Running) -> list[Hook]:
    """All hooks of a pass; what several analyzers need is read once, and first."""
    shared = dict.fromkeys(one for analyzer in analyzers for one in analyzer.needs())
    needed = (hook for one in shared for hook in one.hooks(model, running))
    hooks: list[Hook] = [(name, partial(_read, function)) for name, function in needed]
    return hooks + [
        (point.name, partial(_hand, analyzer, point, running))
        for analyzer in analyzers
        for point in analyzer.reading
    ]


def _read(function: Callable[..., Tensor | None], x: Tensor, hook: Any) -> Tensor | None:
    if is_aside():
        return None
    try:
        with full_precision():
            return function(x, hook=hook)
    except SampleError:
        raise
    except ValueError as error:
        # A ValueError of the model's says that it refuses a sample; this is none.
        raise RuntimeError(f"Reading {hook.name} failed: {error}") from error


def _hand(analyzer: Any, point: Point, running: Running, x: Tensor, hook: Any) -> None:
    batch = running()
    if is_aside():
        return
    if batch is not None:
        if point.site == "llm":
            require_positions(x, point.name, batch, _position_axes(point, hook))
        analyzer.receive(x, point, batch)
    elif point.site != "llm":
        raise RuntimeError(OUTSIDE.format(tower=point.site))


def _position_axes(point: Point, hook: Any) -> tuple[int, ...]:
    """The axes of a hook point that are positions, as TransformerLens says."""
    axis = getattr(hook, "pos_dim", None)
    if axis is not None:
        return (axis,)
    return (-2, -1) if point.name.endswith(("hook_pattern", "hook_attn_scores")) else (1,)


def require_positions(x: Tensor, name: str, batch: Batch, axes: tuple[int, ...] = (1,)) -> None:
    """Refuse what does not have the samples and positions of a batch's masks.

    Args:
        x: What passes through a point of the decoder, [sample ...].
        name: Of the point.
        batch: What the pass is about.
        axes: Those that are positions.

    Raises:
        RuntimeError: The positions are others.
    """
    samples, positions = next(iter(batch.masks.values())).shape
    there = [-x.ndim <= axis < x.ndim and x.shape[axis] == positions for axis in axes]
    if len(x) != samples or not all(there):
        raise RuntimeError(
            f"{name} gives {list(x.shape)}, where the masks of the batch have {samples} samples of "
            f"{positions} positions, so it cannot be told which token is where. Read a point that "
            "all of a prompt's positions pass through; an analyzer that reads logits sets "
            "needs_logits."
        )


def prompt_hooks(analyzer: Any, model: Any) -> list[Hook]:
    """Hooks by which an analyzer reads along wherever the model runs; see `Analyzer.hooks`."""
    if analyzer.needs_gradients:
        raise ValueError(
            f"{type(analyzer).__name__} needs gradients, and run_with_hooks makes no backward "
            "pass: use ml.run(model, data, analyzer)."
        )
    prepare(model)
    analyzer.begin(model)
    known, inputs = layout(model), pass_inputs(model)
    running: list[Batch] = []
    last: list[Tensor] = []

    def begin(embedded: Tensor, hook: Any) -> None:
        close()
        # Some families embed other tokens in the place of media.
        ids = embedded if inputs.ids is None else inputs.ids
        former, last[:] = tuple(last), [ids]
        if past_length(inputs.all) or _continues(ids, former, inputs.all):
            return  # a step of generation
        real = torch.ones_like(ids, dtype=torch.bool) if inputs.real is None else inputs.real
        given = inputs.all | {"input_ids": ids, "attention_mask": real}
        index = tuple(range(analyzer.samples, analyzer.samples + len(ids)))
        batch = Batch(given, known.masks(ids, real), tuple(map(str, range(len(ids)))), index=index)
        analyzer.open(batch, model.original_model)
        running.append(batch)

    def close() -> None:
        while running:
            for tower in running.pop().towers.values():
                tower.close()

    def end(last_seen: Tensor, hook: Any) -> None:
        if running and not is_aside():
            batch = running[0]
            close()
            if analyzer.needs_logits:
                batch.once("output", lambda: SimpleNamespace(logits=last_seen.detach()))
            analyzer.end(batch)
            with torch.no_grad():
                analyzer.check(batch)
                analyzer.accept(batch)

    inner = pass_hooks([analyzer], model, lambda: running[0] if running else None)
    over = "unembed.hook_out" if analyzer.needs_logits else "ln_final.hook_out"
    return [("embed.hook_in", begin), *inner, (over, end)]


def _continues(ids: Tensor, former: tuple[Tensor, ...], inputs: dict[str, Any]) -> bool:
    """Whether a pass is a step of `generate` without a cache: the pass before, and one token more.

    Plain calls of a model say nothing about `use_cache` and `return_dict`.
    """
    if inputs.get("use_cache") is not False or "return_dict" not in inputs or not former:
        return False
    (before,) = former
    return ids.shape == (len(before), before.shape[1] + 1) and torch.equal(ids[:, :-1], before)

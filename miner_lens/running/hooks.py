"""The hooks of a pass: what its analyzers read, and what several of them need but once."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from miner_lens.models.access import layout
from miner_lens.models.bridge import pass_inputs, prepare
from miner_lens.models.points import Point
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
    hooks = [hook for one in shared for hook in one.hooks(model, running)]
    return hooks + [
        (point.name, partial(_hand, analyzer, point, running))
        for analyzer in analyzers
        for point in analyzer.reading
    ]


def _hand(analyzer: Any, point: Point, running: Running, x: Tensor, hook: Any) -> None:
    batch = running()
    if batch is not None:
        analyzer.receive(x, point, batch)
    elif point.site != "llm":
        raise RuntimeError(OUTSIDE.format(tower=point.site))


def prompt_hooks(analyzer: Any, model: Any) -> list[Hook]:
    """Hooks by which an analyzer reads along wherever the model runs; see `Analyzer.hooks`."""
    prepare(model)
    analyzer.begin(model)
    known, inputs = layout(model), pass_inputs(model)
    running: list[Batch] = []

    def begin(ids: Tensor, hook: Any) -> None:
        running.clear()
        # transformers 5.24 has renamed it.
        cache = inputs.all.get("cache", inputs.all.get("past_key_values"))
        if cache is not None and cache.get_seq_length() > 0:
            return  # a step of generation
        real = torch.ones_like(ids, dtype=torch.bool) if inputs.real is None else inputs.real
        given = inputs.all | {"input_ids": ids, "attention_mask": real}
        index = tuple(range(analyzer.samples, analyzer.samples + len(ids)))
        batch = Batch(given, known.masks(ids, real), tuple(map(str, range(len(ids)))), index=index)
        analyzer.open(batch, model.original_model)
        running.append(batch)

    def end(residual: Tensor, hook: Any) -> None:
        if running:
            batch = running.pop()
            analyzer.check(batch)
            analyzer.accept(batch)

    inner = pass_hooks([analyzer], model, lambda: running[0] if running else None)
    return [("embed.hook_in", begin), *inner, ("ln_final.hook_out", end)]

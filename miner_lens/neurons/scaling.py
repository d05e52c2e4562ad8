"""Turn neurons up or down, and leave no trace of it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from miner_lens.neurons.ablation import Neurons, ablate
from miner_lens.neurons.writing import Times, Value


@contextmanager
def scale(model: Any, neurons: Neurons, by: float, at: str | None = None) -> Iterator[None]:
    """Multiply neurons by a number while the context is open.

    It is `ablate` with another thing to write, X times `by`, and does all that `ablate` does: it
    nests with other contexts, survives `reset_hooks()`, lets gradients pass, and leaves the model
    as it was. Neurons of several sites are scaled by one context inside the other.

    Args:
        model: A `TransformerBridge` or a plain Hugging Face model, as for `ablate`.
        neurons: The neurons, or what `select` returns, which means all of them.
        by: 0 switches off, exactly as `ablate` does; 1 changes nothing; 2 doubles.
        at: Only at the tokens of this modality; default everywhere.

    Raises:
        ValueError: `by` is no finite number, or as `ablate`.

    Example:
        with ml.scale(model, domains["code"], by=2.0):
            answer = ml.generate(model, messages)
    """
    with ablate(model, neurons, scaled(by), at=at):
        yield


def scaled(by: float) -> Value:
    """What `ablate` is to write in order to multiply.

    Raises:
        ValueError: `by` is no finite number.
    """
    if not isinstance(by, int | float) or not math.isfinite(by):
        raise ValueError(f"by must be a finite number, such as 2.0 or 0.5, not {by!r}.")
    # A product with 0 may be minus zero, and of infinity NaN.
    return "zero" if by == 0 else Times(by)

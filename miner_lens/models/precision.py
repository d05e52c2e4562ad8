"""Full precision for what is made of activations, whatever the user has set for the model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

from miner_lens.models.holders import held, is_held

_DEVICES = [
    device
    for device in ("cpu", "cuda", "mps", "xpu", "hpu", "mtia", "maia", "ipu", "xla")
    if torch.amp.is_autocast_available(device)
]
# Where torch multiplies float32 in TF32 or bfloat16 if it is told so.
_PRODUCTS = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
_FULL = ("none", "ieee")
_KEY = "full precision of products"


@contextmanager
def full_precision() -> Iterator[None]:
    """Compute as written while the context is open: neither autocast nor products of fewer bits.

    It is for code that is given activations, and changes nothing of how the model computes them.

    Example:
        >>> ones = torch.full((1, 3), 1 / 3)
        >>> with torch.autocast("cpu", torch.bfloat16), full_precision():
        ...     (ones @ ones.T).dtype
        torch.float32
    """
    lowered = [device for device in _DEVICES if torch.is_autocast_enabled(device)]
    # The setting is one of the process. Where nobody has made it less it is left alone.
    rounded = is_held(_KEY) or any(one.fp32_precision not in _FULL for one in _PRODUCTS)
    if not lowered and not rounded:
        yield
        return
    with ExitStack() as stack:
        for device in lowered:
            stack.enter_context(torch.autocast(device, enabled=False))
        if rounded:
            stack.enter_context(held(_KEY, _full_products))
        yield


@contextmanager
def _full_products() -> Iterator[None]:
    former = [(products, products.fp32_precision) for products in _PRODUCTS]
    for products, _ in former:
        products.fp32_precision = "ieee"
    try:
        yield
    finally:
        for products, precision in former:
            # As a part of a whole whose setting it has, or with one of its own.
            products.fp32_precision = "none"
            if products.fp32_precision != precision:
                products.fp32_precision = precision

"""Masks of attention that TransformerLens rebuilds, with the effect that they have in the model.

By itself TransformerLens differs in three ways:

- It casts a mask to the dtype of the scores. Under autocast the lowest float32 of an eager mask
  becomes -inf, and a token of padding, which sees nothing, NaN, as does all that reads it later.
- It takes queries for the last of the keys where there is no mask. transformers leaves the mask out
  where they are the first, as in the prompt of a static cache, which has room behind it.
- It gives a token that sees nothing the mean of all values, as eager attention does. Fused
  attention gives it 0.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from miner_lens.models.structure import plain

# The methods by which TransformerLens masks scores, and makes a pattern of them.
MASK = "_apply_reconstruct_attention_mask"
SOFTMAX = "_masked_softmax"

# Where an attention keeps, from one of them to the other, which queries see nothing.
BLIND = "_miner_lens_blind"


def install(attention: Any, before: str | None, after: str | None) -> None:
    """Have an attention that TransformerLens rebuilds mask as the model's own does. Idempotent.

    Args:
        attention: The component.
        before: The attention function that the model's config named before it was in a bridge.
        after: The name that TransformerLens has set in its place. A name that somebody has set
            since is taken at its word.
    """
    if hasattr(attention, MASK) and hasattr(attention, SOFTMAX):
        # Partials, because a deep copy of them belongs to the copy.
        vars(attention)[MASK] = partial(_mask, attention, before, after)
        vars(attention)[SOFTMAX] = partial(_softmax, attention)


def _mask(
    attention: Any,
    before: str | None,
    after: str | None,
    attn_scores: Tensor,
    attention_mask: Tensor | None,
    seq_len: int,
    q_seq_len: int | None = None,
) -> Tensor:
    queries = seq_len if q_seq_len is None else q_seq_len
    causal = attention.is_causal and not attention.is_cross_attention
    blind = None
    if attention_mask is None and causal and 1 < queries < seq_len:
        own = torch.ones(queries, seq_len, dtype=torch.bool, device=attn_scores.device)
        attention_mask = own.tril()[None, None]
    elif attention_mask is not None and not attention.compatibility_mode:
        lowest = torch.finfo(attn_scores.dtype).min
        if attention_mask.is_floating_point():
            attention_mask = attention_mask.clamp(min=lowest)
        if attention_mask.ndim == 4 and _is_fused(attention, before, after):
            seen = attention_mask[..., -queries:, :seq_len]
            seen = seen if seen.dtype == torch.bool else seen > lowest / 2
            blind = ~seen.any(-1, keepdim=True)
    setattr(attention, BLIND, blind)
    masked: Tensor = getattr(type(attention), MASK)(
        attention, attn_scores, attention_mask, seq_len, queries
    )
    return masked


def _softmax(attention: Any, attn_scores: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    pattern: Tensor = getattr(type(attention), SOFTMAX)(attention, attn_scores, dtype)
    blind = getattr(attention, BLIND, None)
    setattr(attention, BLIND, None)
    return pattern if blind is None else pattern.masked_fill(blind, 0)


def _is_fused(attention: Any, before: str | None, after: str | None) -> bool:
    """Whether the model's own attention is fused, by the name that its config has or had."""
    name = getattr(getattr(plain(attention), "config", None), "_attn_implementation", None)
    return (before if name == after else name) not in (None, "eager")

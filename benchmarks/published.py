"""MINER's scores as a reader of the paper would compute them, for comparison.

Both procedures here are written from the definition in docs/method.md: one sample, layer and
modality at a time, with the products of `[pos pos]` and `[pos neuron]` matrices written out. The
answers that the published procedure also generates, but never scores, are left out, and so are its
copies of X for each modality, the logits of all tokens and the key-value cache; without them, what
mining gains over it looks smaller.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

from benchmarks.models import Inputs, Masks, prefill_options

EAGER_AND_UNMASKED = "eager_and_unmasked"


def score(
    x: Tensor, pattern: Tensor, masks: Tensor
) -> Tensor:  # [pos neuron], [query key], [modality pos] -> [metric modality neuron]
    """The five metrics of one sample and layer, min-max normalised over neurons."""
    scores = torch.zeros(5, len(masks), x.shape[1], device=x.device)
    for index, mask in enumerate(masks):
        if not mask.any():
            continue
        own, a = x[mask], pattern[mask][:, mask]
        metrics = [
            (own > 0).float().mean(0),
            own.mean(0),
            own.amax(0),
            (a.softmax(0).T @ own).sum(0),
            (a.softmax(1) @ own).sum(0),
        ]
        raw = torch.stack([metric.float() for metric in metrics])
        low, high = raw.amin(1, keepdim=True), raw.amax(1, keepdim=True)
        scores[:, index] = ((raw - low) / (high - low)).nan_to_num(0.0)
    return scores


def published(model: Any, inputs: Inputs, masks: Masks) -> Tensor:
    """Scores [metric modality layer neuron] of a Hugging Face model, by eager attention.

    Beside its output each layer's attention computes, from Q and K anew as the published code does,
    its head-mean pattern without the causal mask. A forward hook on each activation function scores
    the layer at once, so that memory holds one layer's patterns.
    """
    stacked = torch.stack(list(masks.values()), 1)
    found: list[Tensor] = []
    handles = []
    for layer in model.get_decoder().layers:
        hook = _score_layer(layer.self_attn, stacked, found)
        handles.append(layer.mlp.act_fn.register_forward_hook(hook))
    try:
        with torch.no_grad(), _attention(model, EAGER_AND_UNMASKED):
            model(**inputs, **prefill_options(model))
    finally:
        for handle in handles:
            handle.remove()
    return torch.stack(found, 2)


def naive(bridge: Any, inputs: Inputs, masks: Masks) -> Tensor:
    """Scores [metric modality layer neuron] from one `run_with_cache`.

    What a user of TransformerLens would write by hand: cache the attention patterns and the
    activations of all layers, and then compute. `hook_pattern` is the pattern that the model
    really has, so these are the scores of `ml.mine(attention="causal")`.
    """
    stacked = torch.stack(list(masks.values()), 1)
    ends = ("attn.hook_pattern", "mlp.act.hook_out")
    with torch.no_grad():
        _, cache = bridge.run_with_cache(
            **{"input" if name == "input_ids" else name: value for name, value in inputs.items()},
            **prefill_options(bridge.original_model),
            names_filter=lambda name: name.startswith("blocks.") and name.endswith(ends),
        )
        found = []
        for layer in range(len(bridge.blocks)):
            patterns = cache[f"blocks.{layer}.attn.hook_pattern"].mean(1)
            activations = cache[f"blocks.{layer}.mlp.act.hook_out"]
            found.append(_mean_over_samples(activations, patterns, stacked))
    return torch.stack(found, 2)


def _score_layer(attention: Any, masks: Tensor, found: list[Tensor]) -> Callable[..., None]:
    def hook(module: Any, args: Any, x: Tensor) -> None:
        found.append(_mean_over_samples(x, attention.unmasked_pattern, masks))
        attention.unmasked_pattern = None

    return hook


def _mean_over_samples(x: Tensor, patterns: Tensor, masks: Tensor) -> Tensor:
    samples = zip(x, patterns, masks, strict=True)
    return torch.stack([score(*sample) for sample in samples]).mean(0)


@contextmanager
def _attention(model: Any, name: str) -> Iterator[None]:
    """Compute the decoder's attention, not the towers', by a function of this name."""
    config = model.get_decoder().config
    former = config._attn_implementation
    config._attn_implementation = name
    try:
        yield
    finally:
        config._attn_implementation = former


def _eager_and_unmasked(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Eager attention that also keeps the head mean of what it would be without a mask."""
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    pattern = _pattern(query, key, scaling, mask)
    output = (pattern @ value).transpose(1, 2).contiguous()
    del pattern
    module.unmasked_pattern = _pattern(query, key, scaling).mean(1)
    return output, None


def _pattern(query: Tensor, key: Tensor, scaling: float, mask: Tensor | None = None) -> Tensor:
    scores = query @ key.mT * scaling
    if mask is not None:
        scores = scores + mask
    return scores.softmax(-1, dtype=torch.float32).to(query.dtype)


AttentionInterface.register(EAGER_AND_UNMASKED, _eager_and_unmasked)
AttentionMaskInterface.register(EAGER_AND_UNMASKED, eager_mask)

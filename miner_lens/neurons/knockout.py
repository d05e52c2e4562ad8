"""Cut attention from the last tokens to those of a modality, and leave no trace of it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from miner_lens.models.access import layout
from miner_lens.models.bridge import PassInputs
from miner_lens.models.forward_pass import past_length
from miner_lens.models.inside import hf_model_of, uncompiled
from miner_lens.models.modality import ModalityLayout
from miner_lens.models.structure import decoder_of
from miner_lens.neurons.active import noted


@contextmanager
def knockout(
    model: Any, modality: str, layers: Iterable[int] | None = None, last: int = 1
) -> Iterator[None]:
    """Keep the last tokens from attending to a modality's tokens, in some layers.

    So nothing goes from the one to the other there by attention (Geva et al. 2023, arXiv
    2304.14767). What goes round by other tokens, or in other layers, is not cut. While generating,
    every new token is cut off too. A token always attends to itself.

    Args:
        model: A `TransformerBridge` or a plain Hugging Face model.
        modality: Whose tokens are not attended to, such as `"image"`.
        layers: The layers; by default all.
        last: How many tokens at the end of each prompt are cut off: more than 1 where an answer
            stands behind the prompt.

    Raises:
        ValueError: The model has no such modality or layer, `last` is below 1, or its attention is
            not told by a mask what to attend to.

    Example:
        with ml.knockout(model, "image", layers=range(2, 5)):
            answer = ml.generate(model, messages)
    """
    hf_model = hf_model_of(model)
    blocks = list(decoder_of(hf_model).layers)
    chosen = list(range(len(blocks)) if layers is None else layers)
    if outside := [layer for layer in chosen if not 0 <= layer < len(blocks)]:
        raise ValueError(f"There is no layer {outside[0]}; the model has 0 to {len(blocks) - 1}.")
    if last < 1:
        raise ValueError(f"last must be at least 1, not {last}.")
    cut = _Cut(layout(model), modality, last)
    described = {"knockout": modality, "layers": chosen, "last": last}
    with ExitStack() as open_:
        open_.enter_context(uncompiled())
        open_.enter_context(noted(hf_model, described))
        open_.callback(cut.stop)
        cut.watch(model)
        for layer in chosen:
            attention = getattr(blocks[layer], "self_attn", None)
            if attention is None:
                raise ValueError(
                    f"Layer {layer} of {type(hf_model).__name__} has no self_attn to cut."
                )
            handle = attention.register_forward_pre_hook(cut.mask, with_kwargs=True)
            open_.callback(handle.remove)
        yield


class _Cut(PassInputs):
    """Knows which tokens are not to be attended to, and takes them out of attention masks."""

    def __init__(self, known: ModalityLayout, modality: str, last: int) -> None:
        super().__init__()
        names = known.masks(torch.zeros(1, 1, dtype=torch.long))
        if modality not in names:
            raise ValueError(f"The model has no modality {modality!r}; it has {', '.join(names)}.")
        self.known, self.modality, self.last = known, modality, last
        self.blocked: Tensor | None = None  # of the prompt, also while tokens are generated
        self.past = 0

    def see(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A forward pre-hook of the Hugging Face model."""
        super().see(module, args, kwargs)
        self.past = past_length(kwargs)
        if self.past:
            return
        self.blocked = None
        if self.ids is not None:
            self.blocked = self.known.masks(self.ids, self.real)[self.modality]

    def mask(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A forward pre-hook of attention."""
        hidden = kwargs.get("hidden_states", args[0] if args else None)
        given = kwargs.get("attention_mask")
        four = given is None or (isinstance(given, Tensor) and given.ndim == 4)
        if "attention_mask" not in kwargs or hidden is None or not four:
            raise ValueError(
                "Attention is cut by its mask, and this model's is not told by one [batch head "
                "query key]. Set another attention, model.set_attn_implementation('sdpa')."
            )
        if self.blocked is None:
            raise ValueError(
                "To know which tokens to cut off, the model must be called with input_ids, not "
                "with inputs_embeds."
            )
        batch, queries = hidden.shape[:2]
        keys = self.past + queries if given is None else given.shape[-1]
        blocked = self.blocked.to(hidden.device)
        blocked = torch.nn.functional.pad(blocked, (0, keys - blocked.shape[1]))
        cut = blocked[:, None, None, :].expand(batch, 1, queries, keys).clone()
        # In a prompt the last ones; of generated tokens all.
        cut[:, :, : 0 if self.past else max(0, queries - self.last)] = False
        itself = self.past + torch.arange(queries, device=hidden.device)
        cut[:, :, torch.arange(queries, device=hidden.device), itself] = False
        if given is None:
            seen = torch.ones(queries, keys, dtype=torch.bool, device=hidden.device)
            allowed: Tensor = seen.tril(self.past)[None, None] & ~cut
        elif given.dtype == torch.bool:
            allowed = given & ~cut
        else:
            allowed = given.masked_fill(cut, torch.finfo(given.dtype).min)
        return args, kwargs | {"attention_mask": allowed}

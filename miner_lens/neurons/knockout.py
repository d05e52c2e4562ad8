"""Cut attention from the last tokens to those of a modality, and leave no trace of it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from inspect import signature
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers.utils.generic import is_flash_attention_requested

from miner_lens.models.access import layout
from miner_lens.models.attention import is_causal
from miner_lens.models.forward_pass import Call, cache_of, past_length
from miner_lens.models.inside import hf_model_of, uncompiled
from miner_lens.models.modality import ModalityLayout
from miner_lens.models.structure import attention_name, decoder_of, plain
from miner_lens.neurons.active import noted

NO_MASK = (
    "Attention is cut by its mask, and this model's is not told by one [batch head query key]. Set "
    "another attention, model.set_attn_implementation('sdpa')."
)
NO_IDS = (
    "To know which tokens to cut off, the model must be called with input_ids, not with "
    "inputs_embeds, and from the first token of the prompt on."
)
IN_PARTS = (
    "The prompt goes on in another pass, and its first part's last tokens were cut off as if they "
    "were the prompt's. Give the attention_mask of the whole prompt in every pass, so that the "
    "first knows how much is to come, or call generate(prefill_chunk_size=...)."
)


@contextmanager
def knockout(
    model: Any, modality: str, layers: Iterable[int] | None = None, last: int = 1
) -> Iterator[None]:
    """Keep the last tokens from attending to a modality's tokens, in some layers.

    So nothing goes from the one to the other there by attention (Geva et al. 2023, arXiv
    2304.14767). What goes round by other tokens, or in other layers, is not cut. While generating,
    every new token is cut off too. A token always attends to itself. Padding does not count, and
    how a prompt is fed (at once or in parts, with which cache) makes no difference.

    Args:
        model: A `TransformerBridge` or a plain Hugging Face model.
        modality: Whose tokens are not attended to, such as `"image"`.
        layers: The layers; by default all.
        last: How many tokens at the end of each prompt are cut off: more than 1 where an answer
            stands behind the prompt.

    Raises:
        ValueError: The model has no such modality or layer, `last` is below 1, its attention is
            not told by a mask what to attend to, or a prompt comes in parts of which the first does
            not say so.

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
        begin = hf_model.register_forward_pre_hook(cut.begin, with_kwargs=True)
        end = hf_model.register_forward_hook(cut.end, always_call=True)
        open_.callback(begin.remove)
        open_.callback(end.remove)
        open_.enter_context(_Prompts.announced_to(cut, hf_model))
        for layer in chosen:
            attention = _attention_of(plain(blocks[layer]))
            if attention is None:
                raise ValueError(
                    f"Layer {layer} of {type(hf_model).__name__} has no attention to cut."
                )
            hook = partial(cut.mask, layer)
            handle = attention.register_forward_pre_hook(hook, with_kwargs=True)
            open_.callback(handle.remove)
        yield


def _attention_of(block: Any) -> Any:
    """A layer's attention, inside TransformerLens's component if there is one."""
    name = attention_name(block)
    return getattr(block, "self_attn", None) if name is None else block.get_submodule(name)


class _Prompts:
    """Stands for a model's `generate`, and says how long its prompt is, which may come in parts."""

    def __init__(self, hf_model: Any) -> None:
        self.generate = hf_model.generate
        self.cuts: list[_Cut] = []

    @classmethod
    @contextmanager
    def announced_to(cls, cut: _Cut, hf_model: Any) -> Iterator[None]:
        """Have prompts announced; in force until the last context of a model closes."""
        if not hasattr(hf_model, "generate"):
            yield
            return
        own = vars(hf_model)
        prompts = own.get("generate")
        if not isinstance(prompts, _Prompts):
            prompts = own["generate"] = cls(hf_model)
        prompts.cuts.append(cut)
        try:
            yield
        finally:
            prompts.cuts.remove(cut)
            if not prompts.cuts and own.get("generate") is prompts:
                del own["generate"]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's `generate`."""
        named = dict(zip(signature(self.generate).parameters, args, strict=False)) | kwargs
        texts = (named.get(name) for name in ("inputs", "input_ids", "attention_mask"))
        lengths = [one.shape[1] for one in texts if isinstance(one, Tensor) and one.ndim == 2]
        with self.announce(max(lengths, default=None)):
            return self.generate(*args, **kwargs)

    @contextmanager
    def announce(self, length: int | None) -> Iterator[None]:
        """Have a prompt of so many tokens generated from, by whichever loop."""
        before = [(cut, cut.announced) for cut in self.cuts]
        for cut in self.cuts:
            cut.announced = length
        try:
            yield
        finally:
            for cut, former in before:
                cut.announced = former


class _Cut:
    """Knows which tokens are not to be attended to, and takes them out of attention masks.

    Attributes:
        announced: The length of the prompt that `generate` is at, if it is at one.
    """

    def __init__(self, known: ModalityLayout, modality: str, last: int) -> None:
        names = known.masks(torch.zeros(1, 1, dtype=torch.long))
        if modality not in names:
            raise ValueError(f"The model has no modality {modality!r}; it has {', '.join(names)}.")
        self.known, self.modality, self.last = known, modality, last
        self.announced: int | None = None
        # Which tokens are not to be attended to, by position in the sequence, padding included.
        self.blocked: Tensor | None = None
        self.running = False
        self.cache: Any = None
        self.prompt = self.past = 0  # lengths: of the prompt, and of what went before this pass
        self.later: Tensor | int = 0  # how many real tokens of the prompt come after this pass

    def begin(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A forward pre-hook of the Hugging Face model."""
        given = Call.of(module, args, kwargs).arguments
        ids, whole = given.get("input_ids"), given.get("attention_mask")
        self.cache = cache_of(given)
        self.past = past = past_length(given)
        before, self.blocked, self.running = self.blocked, None, True
        if ids is None or (past and (before is None or before.shape[1] < past)):
            return
        end = past + ids.shape[1]
        if not isinstance(whole, Tensor) or whole.ndim != 2:
            whole = ids[:, :0]
        if not past:
            self.prompt = self.announced or max(end, whole.shape[1])
        elif before is not None and self.announced is None and ids.shape[1] > 1:
            if end > self.prompt and bool(before[:, : self.prompt - 1].any()):
                raise ValueError(IN_PARTS)
            self.prompt = max(self.prompt, end, whole.shape[1])  # nothing has been cut yet
        self.later = max(0, self.prompt - end)
        if whole.shape[1] >= self.prompt > end:
            self.later = whole[:, end : self.prompt].long().sum(1, keepdim=True)
        blocked = self.known.masks(ids)[self.modality]
        blocked[:, max(0, self.prompt - past) :] = False  # what is generated is no part of it
        if past and before is not None:
            blocked = torch.cat([before[:, :past], blocked], 1)
        self.blocked = blocked

    def end(self, *_: Any) -> None:
        """A forward hook of the Hugging Face model."""
        self.running, self.cache = False, None

    def mask(self, layer: int, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A forward pre-hook of attention."""
        attention = plain(module)
        named = Call.of(attention, args, kwargs).arguments
        hidden, given = named.get("hidden_states"), named.get("attention_mask")
        four = given is None or (isinstance(given, Tensor) and given.ndim == 4)
        flash = given is None and _is_flash(attention)
        if "attention_mask" not in named or hidden is None or not four or flash:
            raise ValueError(NO_MASK)
        if self.blocked is None or not self.running:
            raise ValueError(NO_IDS)
        queries, device = hidden.shape[1], hidden.device
        keys = self._keys(queries, attention, layer) if given is None else given.shape[-1]
        # By position in the sequence; a sliding window's cache has dropped the first keys, and a
        # static one has room for more.
        first = max(0, self.past + queries - keys)
        at = self.past + torch.arange(queries, device=device)
        seen = first + torch.arange(keys, device=device)
        if given is None:
            given = _implied(attention, named, at, seen)
        blocked = self.blocked.to(device)
        blocked = pad(blocked, (0, max(0, first + keys - blocked.shape[1])))[:, first:][:, :keys]
        cut = self._last(given, at, first)[:, None, :, None] & blocked[:, None, None]
        cut = cut & (seen != at[:, None])
        if given.dtype == torch.bool:
            allowed: Tensor = given & ~cut
        else:
            allowed = torch.where(cut, torch.finfo(given.dtype).min, given)
        if "attention_mask" in kwargs:
            return args, kwargs | {"attention_mask": allowed}
        place = list(named).index("attention_mask")
        return (*args[:place], allowed, *args[place + 1 :]), kwargs

    def _keys(self, queries: int, attention: Any, layer: int) -> int:
        """How many keys attention has without a mask, a static cache's room included."""
        if self.cache is None:
            return self.past + queries
        return int(self.cache.get_mask_sizes(queries, getattr(attention, "layer_idx", layer))[0])

    def _last(self, mask: Tensor, at: Tensor, first: int) -> Tensor:
        """Which queries of this pass are cut off: the last real ones of a prompt, and all after."""
        # Padding does not even see itself.
        itself = mask[:, 0, torch.arange(len(at), device=at.device), at - first]
        if itself.dtype != torch.bool:
            itself = itself > torch.finfo(itself.dtype).min
        of_prompt = itself & (at < self.prompt)
        later = self.later.to(at.device) if isinstance(self.later, Tensor) else self.later
        still = of_prompt.flip(1).cumsum(1).flip(1) + later  # with itself
        return (of_prompt & (still <= self.last)) | (at >= self.prompt)


def _implied(attention: Any, arguments: dict[str, Any], at: Tensor, seen: Tensor) -> Tensor:
    """Make the mask that attention goes by where it is given none."""
    if is_causal(attention, arguments):
        return (seen <= at[:, None])[None, None]
    return (seen <= at[-1]).expand(1, 1, len(at), len(seen))


def _is_flash(attention: Any) -> bool:
    config = getattr(attention, "config", None)
    return hasattr(config, "_attn_implementation") and is_flash_attention_requested(config)

"""Media for tools that pass tokens only."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from miner_lens.models.access import layout
from miner_lens.models.forward_pass import past_length
from miner_lens.models.generation import Inputs
from miner_lens.models.hook import ContextHook
from miner_lens.models.inside import bare, hf_model_of, is_bridge

# What Hugging Face's generate passes in the place of media that it has encoded already.
ENCODED = "mm_encoder_outputs"


@contextmanager
def bind(model: Any, inputs: Mapping[str, Any]) -> Iterator[Any]:
    """Give the model these inputs' media wherever it is called with tokens alone.

    For tools that know no images or sounds, as TransformerLens's activation patching and
    `run_with_cache(tokens)`. Passes that bring media of their own, that have no placeholders, or
    that go on with a cache are left alone. While the context is open, a bridge's `hook_embed` is
    what enters the first layer, media in the place of their placeholders, so that
    `decompose_resid` and its kin add up at media tokens too.

    Args:
        model: A `TransformerBridge` or a plain Hugging Face model.
        inputs: What `ml.inputs` returns. The tokens that are passed may be others, of other length,
            and several times as many rows, if they have as many placeholders in each row.

    Yields:
        The model.

    Raises:
        ValueError: The inputs have no token ids or are padded, or no modality layout is known; in
            a pass, the tokens do not fit the media, or positions are given that may not count them.

    Example:
        from transformer_lens import patching

        inputs = ml.inputs(model, messages)
        tokens = inputs["input"]
        with ml.bind(model, ml.inputs(model, other_messages)):
            _, cache = model.run_with_cache(tokens)
        with ml.bind(model, inputs):
            effect = patching.get_act_patch_resid_pre(model, tokens, cache, metric)
    """
    bound = _Bound(inputs, layout(model).media)
    inner, hf_model = bare(model), hf_model_of(model)
    with ExitStack() as open_:
        # First, so that other hooks on the model's inputs see the media.
        fill = ContextHook(bound.fill)
        handle = hf_model.register_forward_pre_hook(fill, with_kwargs=True, prepend=True)
        open_.callback(handle.remove)
        if is_bridge(inner):
            open_.enter_context(_embeddings_with_media(inner))
        yield model


class _Bound:
    """Model inputs, and how they complete a pass."""

    def __init__(self, inputs: Mapping[str, Any], media: Mapping[str, int]) -> None:
        rest: Inputs = dict(inputs)
        ids = rest.pop("input_ids", None)
        other = rest.pop("input", None)
        ids = other if ids is None else ids
        if not isinstance(ids, Tensor):
            raise ValueError(
                "bind needs inputs with token ids, as ml.inputs returns them: it looks for "
                f"'input' or 'input_ids' and was given {', '.join(inputs) or 'nothing'}."
            )
        self.ids: Tensor = ids
        self.mask = rest.pop("attention_mask", None)
        if self.mask is not None and not bool(self.mask.all()):
            raise ValueError(
                "bind takes inputs without padding, as tools that pass tokens only do not say "
                "where padding is. Bind one sample at a time, or samples of one length."
            )
        self.media = {name: token for name, token in media.items() if bool((ids == token).any())}
        # Such as the kind of each token; all else belongs to media.
        self.by_token = {n: t for n, t in rest.items() if getattr(t, "shape", None) == ids.shape}
        self.rest = {name: value for name, value in rest.items() if name not in self.by_token}
        self._last: tuple[Tensor, Inputs] | None = None

    def fill(
        self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """A forward pre-hook of the Hugging Face model that adds what a pass lacks."""
        ids = args[0] if args else kwargs.get("input_ids")
        own = [*self.rest, *self.by_token, ENCODED]
        brings = any(kwargs.get(name) is not None for name in own)
        if not isinstance(ids, Tensor) or brings or past_length(kwargs):
            return None
        if self._last is None or self._last[0] is not ids:
            self._last = ids, self._for(ids)
        found = self._last[1]
        if found and kwargs.get("position_ids") is not None:
            raise ValueError(
                "This pass was given position_ids beside tokens alone, and positions may depend "
                "on the media. Leave them out, or pass all inputs: to generate, use ml.generate."
            )
        given = {name: value for name, value in kwargs.items() if value is not None}
        return args, kwargs | found | given

    def _for(self, ids: Tensor) -> Inputs:
        """The rest of the inputs of a pass with these token ids."""
        ids_here = self.ids.to(ids.device)
        if not any(bool((ids == token).any()) for token in self.media.values()):
            return {}
        times, over = divmod(len(ids), len(ids_here))
        wanted = {
            name: (ids_here == token).sum(-1).repeat(times) for name, token in self.media.items()
        }
        for name, counts in wanted.items():
            here = (ids == self.media[name]).sum(-1)
            if over or not torch.equal(here, counts):
                raise ValueError(
                    f"These tokens have {_listed(here)} placeholders of {name} in their rows, and "
                    f"the inputs that are bound {_listed((ids_here == self.media[name]).sum(-1))}. "
                    "Bind the inputs that belong to the tokens."
                )
        found = {name: _tiled(value, times) for name, value in self.rest.items()}
        tiled = ids_here.repeat(times, 1)
        for name, values in self.by_token.items():
            found[name] = self._by_token(ids, tiled, _tiled(values, times))
        if self.mask is not None:
            found["attention_mask"] = torch.ones_like(ids, dtype=self.mask.dtype)
        return found

    def _by_token(self, ids: Tensor, known: Tensor, values: Tensor) -> Tensor:
        """What is said of each token, moved to where the placeholders are."""
        is_medium = torch.isin(ids, ids.new_tensor(list(self.media.values())))
        was_medium = torch.isin(known, known.new_tensor(list(self.media.values())))
        if torch.equal(is_medium, was_medium):
            return values
        moved = torch.zeros_like(ids, dtype=values.dtype)
        for token in self.media.values():
            moved[ids == token] = values[known == token][0]
        return moved


def _tiled(value: Any, times: int) -> Any:
    """Media and rows of inputs, over and over again."""
    if not isinstance(value, Tensor) or times == 1:
        return value
    return value.repeat(times, *[1] * (value.ndim - 1))


def _listed(counts: Tensor) -> str:
    return ", ".join(map(str, counts.tolist()))


class _Silent(nn.Module):
    """In the place of a hook point that fires later."""

    def has_hooks(self, *_: Any, **__: Any) -> bool:
        """What TransformerLens asks before it fires."""
        return False

    def forward(self, x: Tensor) -> Tensor:
        """As it is."""
        return x


@contextmanager
def _embeddings_with_media(bridge: Any) -> Iterator[None]:
    """Have `hook_embed` fire where the first layer begins, where media are in their places."""
    embed, blocks = bridge._modules.get("embed"), bridge._modules.get("blocks")
    point = None if embed is None else embed._modules.get("hook_out")
    if point is None or not blocks:
        yield
        return
    waiting = False

    def silence(*_: Any) -> None:
        nonlocal waiting
        waiting = True
        embed._modules["hook_out"] = _Silent()

    def restore(*_: Any) -> None:
        embed._modules["hook_out"] = point

    def fire(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        nonlocal waiting
        if not waiting:
            return None
        waiting = False
        if args:
            return (point(args[0]), *args[1:]), kwargs
        return args, kwargs | {"hidden_states": point(kwargs["hidden_states"])}

    handles = [
        embed.register_forward_pre_hook(ContextHook(silence)),
        embed.register_forward_hook(ContextHook(restore), always_call=True),
        blocks[0].register_forward_pre_hook(ContextHook(fire), with_kwargs=True, prepend=True),
    ]
    try:
        yield
    finally:
        restore()
        for handle in handles:
            handle.remove()

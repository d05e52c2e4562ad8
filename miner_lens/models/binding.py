"""Media for tools that pass tokens only."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from miner_lens.models.access import layout
from miner_lens.models.bound import Bound, Run
from miner_lens.models.hook import ContextHook
from miner_lens.models.inside import bare, hf_model_of, is_bridge

IDS = {"input", "input_ids"}
INPUTS = (
    "It takes the model inputs that ml.inputs makes of a conversation, token ids and media by "
    "name: ml.bind(model, ml.inputs(model, messages))."
)


@contextmanager
def bind(model: Any, *inputs: Mapping[str, Any]) -> Iterator[Any]:
    """Give the model these inputs' media wherever it is called with tokens alone.

    For tools that know no images or sounds, as TransformerLens's activation patching and
    `run_with_cache(tokens)`. Each row of a pass gets the media of the bound row that has its
    tokens, or else begins it (as in generation), or else has its placeholders, whatever the order
    and number of rows. Where several such rows are bound and their media differ, the row is the one
    whose memory it is: `attribution_patch(model, clean["input"], corrupted["input"], metric)` under
    `bind(model, clean, corrupted)` tells two pictures under the same tokens apart. Rows without
    placeholders, passes that bring media of their own, and passes that go on with a cache are left
    alone.

    While the context is open, a bridge's `hook_embed` is what enters the first layer, media in the
    place of their placeholders, so that `decompose_resid` and its kin add up at media tokens too;
    and `start_at_layer` has the positions and masks of the inputs.

    Args:
        model: A `TransformerBridge` or a plain Hugging Face model.
        inputs: What `ml.inputs` returns, or a batch of such without padding; several, which may be
            of different length.

    Yields:
        The model.

    Raises:
        TypeError: There are no inputs, or they are messages or tokens instead.
        ValueError: Inputs have no token ids or are padded, or no modality layout is known; in
            a pass, the tokens do not fit the media or fit several, or positions are given that may
            not count them.

    Example:
        from transformer_lens import patching

        inputs = ml.inputs(model, messages)
        tokens = inputs["input"]
        with ml.bind(model, ml.inputs(model, other_messages)):
            _, cache = model.run_with_cache(tokens)
        with ml.bind(model, inputs):
            effect = patching.get_act_patch_resid_pre(model, tokens, cache, metric)
    """
    inner, hf_model = bare(model), hf_model_of(model)
    _require_inputs(inputs)
    bound = Bound(hf_model, [Run(hf_model, one) for one in inputs], layout(model).media)
    with ExitStack() as open_:
        # First, so that other hooks on the model's inputs see the media.
        fill = ContextHook(bound.fill)
        handle = hf_model.register_forward_pre_hook(fill, with_kwargs=True, prepend=True)
        open_.callback(handle.remove)
        if is_bridge(inner):
            open_.enter_context(_embeddings_with_media(inner))
        yield model


def _require_inputs(inputs: tuple[Any, ...]) -> None:
    if not inputs:
        raise TypeError(f"bind was given no inputs beside the model. {INPUTS}")
    for given in inputs:
        several = isinstance(given, list | tuple)
        parts = given if several else [given]
        if several and parts and all(isinstance(one, Mapping) and IDS & {*one} for one in parts):
            raise TypeError(
                f"bind takes several inputs one after the other, not in a {type(given).__name__}: "
                "ml.bind(model, *inputs)."
            )
        if isinstance(given, Mapping) and "role" not in given:
            continue
        if isinstance(given, Tensor):
            what = f"a tensor of shape {list(given.shape)}, in which there are no media"
        elif isinstance(given, Mapping) or _is_conversation(given):
            what = "chat messages"
        else:
            what = f"{given!r:.60} of type {type(given).__name__}"
        raise TypeError(f"bind was given {what}. {INPUTS}")


def _is_conversation(given: Any) -> bool:
    while isinstance(given, list | tuple) and given:
        given = given[0]
    return isinstance(given, Mapping) and "role" in given


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

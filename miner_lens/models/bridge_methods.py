"""Methods of TransformerLens and transformers that a wrapped model has of its own.

They do what those of the class do, where that is right for multimodal models, and refuse the rest.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import MethodType
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from transformers.utils.generic import ModelOutput

from miner_lens.models import attention
from miner_lens.models.collate import brings_media
from miner_lens.models.forward_pass import Call, past_length
from miner_lens.models.hook import ContextHook
from miner_lens.models.inside import hf_model_of
from miner_lens.models.structure import plain, way_to_decoder

# By which a user asks transformers for continuous batching, in the end.
CONTINUOUS = "init_continuous_batching"
# By which TransformerLens has an MLP compute without its modules.
PROCESSED = "_use_processed_weights"

NOT_PACKED = (
    "Continuous batching needs attention that Hugging Face computes, and TransformerLens rebuilds "
    "this model's. Answer with ml.generate, or take the model out with ml.unwrap(bridge): "
    "ml.ablate takes it as it is."
)
OPEN = (
    "Compatibility mode changes weights and hooks of the model, and a context of miner-lens "
    "(ml.ablate, ml.bind) is open on it. Close it, or call enable_compatibility_mode first."
)
NO_START = (
    "start_at_layer goes on from a residual stream, and this model makes its positions or its mask "
    "from tokens and media, which are not known here. Open ml.bind(model, inputs) around the call, "
    "with the inputs that the residual stream was made of, or pass {wanted}."
)
GREEDY = (
    "Greedy decoding finds fewer answers than num_return_sequences={count}. Pass do_sample=True to "
    "sample them, or search with beams: ml.generate(model, messages, num_beams={count}, "
    "num_return_sequences={count})."
)
NO_BEAMS = (
    "TransformerLens's model.generate has no beam search. Use ml.generate(model, messages, "
    "num_beams=...), which takes all options of Hugging Face's generate, or leave num_beams out."
)
UNLIKE = (
    "Without a cache, model.generate passes media and all that there is for each token at every "
    "step, and {name} of shape {shape} may say something of each token. Use ml.generate, or "
    "use_past_kv_cache=True."
)


def install(bridge: Any, hf_model: Any) -> list[Any]:
    """Give a bridge and its model their own methods; returns handles of the hooks this needs."""
    bridge.generate = MethodType(generate, bridge)
    bridge.enable_compatibility_mode = MethodType(enable_compatibility_mode, bridge)
    compute_by_activation(bridge)
    if attention.rebuilt(attention.attentions_of(bridge)) and hasattr(hf_model, CONTINUOUS):
        vars(hf_model)[CONTINUOUS] = _refuse_packed
    return [
        hf_model.register_forward_pre_hook(hook, with_kwargs=True, prepend=True)
        for hook in (_continue_positions, _refuse_start)
        if read_off_tokens(hf_model)
    ]


def uninstall(hf_model: Any) -> None:
    """Leave the model its class's methods."""
    vars(hf_model).pop(CONTINUOUS, None)


def generate(
    bridge: Any, *args: Any, num_return_sequences: int | None = None, **kwargs: Any
) -> Any:
    """Sample tokens as TransformerBridge.generate does, media being seen at each step.

    Args:
        bridge: The bridge.
        args: What TransformerBridge.generate takes.
        num_return_sequences: How many answers to sample to each prompt; they follow each other.
        kwargs: What TransformerBridge.generate takes.

    Raises:
        ValueError: Beams are asked for, or several answers without sampling.
    """
    count = 1 if num_return_sequences is None else num_return_sequences
    require_count(count)
    if (kwargs.pop("num_beams", None) or 1) > 1:
        raise ValueError(NO_BEAMS)
    method = type(bridge).generate
    if count > 1:
        args, kwargs = _repeated(inspect.signature(method).bind(bridge, *args, **kwargs), count)
    else:
        args = (bridge, *args)
    with _media_at_each_step(hf_model_of(bridge)):
        made = method(*args, **kwargs)
    return made if count == 1 else _grouped(made, count)


def require_count(count: Any) -> None:
    """Refuse a number of answers to each prompt that is none.

    Raises:
        ValueError: It is below 1, or no whole number.
    """
    if not isinstance(count, int) or count < 1:
        raise ValueError(f"num_return_sequences must be a whole number from 1 on, not {count!r}.")


def _repeated(given: inspect.BoundArguments, count: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return arguments of TransformerBridge.generate with the whole batch several times.

    Media lie end to end, so that they need not be told apart.

    Raises:
        ValueError: The arguments ask for greedy decoding.
    """
    given.apply_defaults()
    told = given.arguments
    if not told["do_sample"]:
        raise ValueError(GREEDY.format(count=count))

    def repeated(name: str, value: Any) -> Any:
        if isinstance(value, Tensor) and value.ndim:
            # Positions of multimodal RoPE have the batch second.
            return torch.cat([value] * count, 1 if name == "position_ids" and value.ndim > 2 else 0)
        return value * count if isinstance(value, list | tuple) else value

    if isinstance(told["input"], str):
        told["input"] = [told["input"]]
    # All others say how to generate.
    told |= {n: repeated(n, told[n]) for n in ("input", "pixel_values", "attention_mask")}
    rest = told["multimodal_kwargs"]
    told["multimodal_kwargs"] = {name: repeated(name, value) for name, value in rest.items()}
    return given.args, given.kwargs


def _grouped(made: Any, count: int) -> Any:
    """Return what was generated of a repeated batch with the answers to each prompt together."""
    if isinstance(made, ModelOutput):
        for name, value in made.items():
            made[name] = _grouped(value, count)
        return made
    if isinstance(made, tuple):
        return tuple(_grouped(one, count) for one in made)
    if isinstance(made, Tensor):
        return made.reshape(count, -1, *made.shape[1:]).transpose(0, 1).flatten(0, 1)
    if isinstance(made, list):
        prompts = len(made) // count
        return [answer for first in range(prompts) for answer in made[first::prompts]]
    return made


def enable_compatibility_mode(bridge: Any, *args: Any, **kwargs: Any) -> None:
    """Process weights as TransformerLens does, MLPs calling their activation module still.

    Raises:
        ValueError: An ablation of the model, or media that are bound to it, are open.
    """
    if any(isinstance(hook, ContextHook) for hook in _hooks(hf_model_of(bridge))):
        raise ValueError(OPEN)
    type(bridge).enable_compatibility_mode(bridge, *args, **kwargs)
    compute_by_activation(bridge)


def compute_by_activation(bridge: Any) -> None:
    """Have gated MLPs with processed weights compute through their activation module again.

    The processed weights are in their projections, so that this gives what TransformerLens's own
    functional path gives.
    """
    from transformer_lens.model_bridge.generalized_components import (
        GatedMLPBridge,
        JointGateUpMLPBridge,
    )

    for block in bridge.blocks:
        mlp = block._modules.get("mlp")
        if mlp is None or "act" not in mlp._modules:
            continue
        # The one computes through Hugging Face's module, the other through its own projections.
        inside = list(plain(mlp)._modules.values())
        projections = [mlp._modules.get(name) for name in ("gate", "in", "out")]
        within = all(any(one is child for child in inside) for one in projections)
        forward = type(mlp).forward
        if forward is JointGateUpMLPBridge.forward or (
            forward is GatedMLPBridge.forward and within
        ):
            vars(mlp)[PROCESSED] = False


def read_off_tokens(hf_model: Any) -> list[str]:
    """Return the arguments that say what a model otherwise makes from tokens and media.

    These are positions of multimodal RoPE, and kinds of tokens for a mask.
    """
    rope = any(hasattr(plain(module), "get_rope_index") for module in way_to_decoder(hf_model))
    takes = inspect.signature(hf_model.forward).parameters
    return ["position_ids"] * rope + [name for name in takes if name.endswith("token_type_ids")]


def starts_later(hf_model: Any) -> bool:
    """Return True if TransformerLens has been told to go on from a residual stream."""
    return any(vars(module).get("_start_at_layer_idx") is not None for module in hf_model.modules())


def _hooks(hf_model: nn.Module) -> Iterator[Any]:
    for module in hf_model.modules():
        yield from module._forward_pre_hooks.values()
        yield from module._forward_hooks.values()


def _refuse_packed(*_: Any, **__: Any) -> NoReturn:
    raise ValueError(NOT_PACKED)


def _refuse_start(hf_model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """A forward pre-hook of a model that makes positions or masks from the tokens."""
    if kwargs.get("inputs_embeds") is None or not starts_later(hf_model):
        return
    wanted = read_off_tokens(hf_model)[0]
    if kwargs.get(wanted) is None:
        raise ValueError(NO_START.format(wanted=wanted))


def _continue_positions(
    hf_model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """A forward pre-hook: positions where a pass goes on with a cache and a mask of the past too.

    Hugging Face's generate passes them; without them the model would make one for each token of the
    mask.
    """
    if not past_length(kwargs):
        return None
    given = Call.of(hf_model, args, kwargs).arguments
    ids, mask = given.get("input_ids"), given.get("attention_mask")
    if given.get("position_ids") is not None or not isinstance(ids, Tensor):
        return None
    if not isinstance(mask, Tensor) or mask.ndim != 2 or mask.shape[1] <= ids.shape[1]:
        return None
    past, pos = past_length(kwargs), ids.shape[1]
    kept = (vars(plain(module)).get("rope_deltas") for module in way_to_decoder(hf_model))
    offset = next((one for one in kept if one is not None), None)
    if offset is None or mask.shape[1] < past + pos:
        return None
    positions = (mask.long().cumsum(-1) - 1).clamp(min=0)[:, past : past + pos]
    offset = offset.reshape(-1, 1).to(positions.device)
    positions = positions + offset.repeat_interleave(len(positions) // len(offset), dim=0)
    return args, kwargs | {"position_ids": positions.expand(3, *positions.shape)}


@contextmanager
def _media_at_each_step(hf_model: Any) -> Iterator[None]:
    """Have passes without a cache bring the media of the first one, with more tokens.

    What asks to be told of Hugging Face's prompts (attention that is cut) is told of this one too.
    """
    first: dict[str, Any] = {}
    announce = getattr(vars(hf_model).get("generate"), "announce", None)

    def complete(
        module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        given = Call.of(module, args, kwargs).arguments
        ids = given.get("input_ids")
        if not first:
            first.update(given)
            if announce is not None and isinstance(ids, Tensor):
                open_.enter_context(announce(ids.shape[1]))
            return None
        if not isinstance(ids, Tensor) or past_length(given) or not brings_media(first):
            return None
        return args, _longer(first, ids) | kwargs

    hook = ContextHook(complete)
    with ExitStack() as open_:
        handle = hf_model.register_forward_pre_hook(hook, with_kwargs=True, prepend=True)
        open_.callback(handle.remove)
        yield


def _longer(first: dict[str, Any], ids: Tensor) -> dict[str, Any]:
    """What a pass was given beside token ids, mask and positions, for these longer ids."""
    before = first["input_ids"].shape
    rest = {}
    for name, value in first.items():
        if name in ("input_ids", "attention_mask", "position_ids", "use_cache"):
            continue
        whole = isinstance(value, Tensor) and not value.is_floating_point()
        if whole and value.shape[:2] == before:
            if value.ndim > 2:
                raise ValueError(UNLIKE.format(name=name, shape=list(value.shape)))
            # Such as the kind of each token, which is text.
            value = torch.nn.functional.pad(value, (0, ids.shape[1] - before[1]))
        rest[name] = value
    return rest

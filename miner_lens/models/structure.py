"""What a model's parts are, read off the Hugging Face model itself.

transformers names its parts alike in all families: `get_decoder` and `get_encoder` say which module
is what, and within them a few names of linear layers stand for an MLP. Nothing here knows a family.
A model that hides its parts has an installed package describe them (`ENTRY_POINTS`).
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from miner_lens.installed import described
from miner_lens.models.modality import media_tokens

ENTRY_POINTS = "miner_lens.sites"
ACTIVATION_NAMES = ("act_fn", "activation_fn", "act")
GATED = ("gate_proj", "up_proj", "down_proj")
FUSED = ("gate_up_proj", "down_proj")  # the activation function takes a half of the first

# The linear layers of a plain MLP, with the activation function beside them, where transformers'
# modules have one, or between them, where they are a sequence.
_PLAIN = (
    ("fc1", "fc2"),
    ("linear_fc1", "linear_fc2"),
    ("linear_1", "linear_2"),
    ("lin1", "lin2"),
)
_SEQUENCE = ("0", "1", "2")
# Where each of the two linear layers has a module of its own. The first pair is that of a module
# that queries media; the text beside it passes through the second.
_PARTED = (("intermediate_query", "output_query"), ("intermediate", "output"))


@dataclass(frozen=True)
class MLP:
    """One layer's MLP: where its neurons are read and written.

    Attributes:
        activation: The activation function's module; its output is X, [... neuron].
        before: The linear layer whose output the activation function takes (in a gated MLP the
            gate projection).
        down: The linear layer that takes the neurons back, `neuron -> d_model`.
    """

    activation: nn.Module
    before: Any
    down: Any


@dataclass(frozen=True)
class Layer:
    """Where one layer's parts are: names from the model, as in `model.visual.blocks.0.attn`.

    Attributes:
        activation: The activation function of its MLP.
        before: The linear layer before it.
        down: The linear layer that takes the neurons back.
        attention: The attention, or None where a layer has none.
    """

    activation: str
    before: str
    down: str
    attention: str | None = None


@dataclass(frozen=True)
class Stack:
    """A part of a model, outside its decoder, in which neurons live.

    Attributes:
        site: `"vision"`, `"audio"` or `"projector"`.
        module: The name of the module that is called once for all items of a medium.
        modalities: The media that pass through it.
        layers: Its layers that have neurons.
        blocks: The name of the list of its layers; None for a single MLP, and for several that
            stand in different places.
    """

    site: str
    module: str
    modalities: tuple[str, ...]
    layers: tuple[Layer, ...]
    blocks: str | None = None


def plain(module: Any) -> Any:
    """The Hugging Face module inside a TransformerLens component, or the module itself."""
    while getattr(module, "original_component", None) is not None:
        module = module.original_component
    return module


def children(module: Any) -> dict[str, Any]:
    """The Hugging Face modules below one, by name."""
    below = plain(module)._modules
    return {name: plain(child) for name, child in below.items() if child is not None}


def part(module: Any, path: str) -> Any:
    """The Hugging Face module of that name below another.

    Raises:
        ValueError: There is none.
    """
    found = plain(module)
    for name in path.split(".") if path else ():
        below = children(found)
        if name not in below:
            raise ValueError(f"{type(plain(module)).__name__} has no module {path!r}.")
        found = below[name]
    return found


def walk(module: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """All Hugging Face modules below one, itself first, with their names."""
    yield path, plain(module)
    for name, child in children(module).items():
        yield from walk(child, joined(path, name))


def decoder_of(hf_model: Any) -> Any:
    """The decoder of a Hugging Face model, which has its layers.

    A few models say that it is they themselves, or a model with a head around it.
    """
    decoder = plain(hf_model.get_decoder())
    while "layers" not in decoder._modules and "model" in decoder._modules:
        decoder = children(decoder)["model"]
    return decoder


def way_to_decoder(hf_model: Any) -> list[nn.Module]:
    """The modules that call each other down to the decoder: the model first, the decoder last."""
    decoder = decoder_of(hf_model)
    names = (name for name, module in hf_model.named_modules() if module is decoder)
    way = [hf_model]
    for name in next(names, "").split("."):
        if name:
            way.append(way[-1]._modules[name])
    return [module for module in way if not isinstance(module, nn.ModuleList)]


def joined(path: str, *names: str) -> str:
    """A longer name."""
    return ".".join(name for name in (path, *names) if name)


def mlp_names(module: Any) -> tuple[str, str, str] | None:
    """The names of an MLP's (activation, layer before it, layer after it) in a module, or None.

    Example:
        >>> mlp_names(nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4)))
        ('1', '0', '2')
    """
    below = children(module)
    act = next((name for name in ACTIVATION_NAMES if name in below), None)
    if act is not None:
        if all(name in below for name in GATED):
            return act, GATED[0], GATED[2]
        if all(name in below for name in FUSED):
            return act, *FUSED
        for before, down in _PLAIN:
            if before in below and down in below:
                return act, before, down
    if isinstance(module, nn.Sequential) and tuple(below) == _SEQUENCE:
        first, middle, last = below.values()
        linear = all(hasattr(one, "in_features") for one in (first, last))
        if linear and next(middle.parameters(), None) is None:
            return "1", "0", "2"
    for before, down in _PARTED:
        if before in below and down in below:
            names = [n for n in children(below[before]) if n.endswith("act_fn")]
            if names:
                return f"{before}.{names[0]}", f"{before}.dense", f"{down}.dense"
    return None


def layer_of(block: Any, path: str) -> Layer | None:
    """A block's MLP and attention by their names; None where it has no MLP with an activation."""
    for name, module in _near(block):
        names = mlp_names(module)
        if names is not None:
            attention = attention_name(block)
            return _layer(module, names, joined(path, name), attention and joined(path, attention))
    return None


def _layer(mlp: Any, names: tuple[str, str, str], path: str, attention: str | None = None) -> Layer:
    activation, *linear = names
    before, down = (joined(path, _linear_name(mlp, name)) for name in linear)
    return Layer(joined(path, activation), before, down, attention)


def _linear_name(module: Any, name: str) -> str:
    """The name of a linear layer, also inside a module that clips what goes in and comes out."""
    around = part(module, name)
    inside = [below for below, child in children(around).items() if hasattr(child, "in_features")]
    if hasattr(around, "in_features") or len(inside) != 1:
        return name
    return joined(name, inside[0])


def attention_name(block: Any) -> str | None:
    """The name of a block's attention, or None where none is by transformers' interface."""
    return next((name for name, module in _near(block) if name and _attends(module)), None)


def _near(block: Any) -> Iterator[tuple[str, Any]]:
    return ((name, module) for name, module in walk(block) if name.count(".") < 2)


def _attends(module: Any) -> bool:
    """Whether a module calls transformers' attention interface, which its config names."""
    named = hasattr(getattr(module, "config", None), "_attn_implementation")
    return named and any(hasattr(module, name) for name in ("scaling", "scale", "is_causal"))


# Found once for each model, as wrapping and unwrapping change no name.
_read: weakref.WeakKeyDictionary[nn.Module, tuple[Stack, ...]] = weakref.WeakKeyDictionary()


def stacks(hf_model: Any) -> tuple[Stack, ...]:
    """The towers and projectors of a Hugging Face model, inside a bridge or not.

    An installed package may describe a model that hides them, by a function `(hf_model)` that
    returns them, named in the entry-point group `miner_lens.sites` under the model's class.
    """
    if hf_model not in _read:
        read = described(ENTRY_POINTS, type(hf_model).__name__) or _stacks
        _read[hf_model] = tuple(read(hf_model)) if hasattr(hf_model, "get_encoder") else ()
    return _read[hf_model]


def _stacks(hf_model: Any) -> Iterator[Stack]:
    named = {id(module): path for path, module in walk(hf_model)}
    media: dict[str, list[str]] = {}  # what passes through a tower, by the tower's name
    for modality in media_tokens(hf_model.config):
        encoder = plain(hf_model.get_encoder(modality=modality))
        # A model without an encoder of the medium returns itself, or its inner model.
        if named.get(id(encoder)) and not _holds(encoder, decoder_of(hf_model)):
            media.setdefault(named[id(encoder)], []).append(modality)
    inside: dict[str, tuple[str, ...]] = {}
    for tower, modalities in media.items():
        inside[tower] = tuple(modalities)
        site = "audio" if "audio" in modalities else "vision"
        found = _blocks(part(hf_model, tower), tower)
        if found is not None:
            yield Stack(site, tower, tuple(modalities), *found)
    if media:
        yield from _projector(hf_model, inside)


def _blocks(tower: Any, path: str) -> tuple[tuple[Layer, ...], str] | None:
    """The layers of a list of blocks that have MLPs, and the list's name.

    Of several it is the first with attention; or else, as attention may be outside transformers'
    interface, the first.
    """
    found = [
        (layers, name)
        for name, module in walk(tower, path)
        if isinstance(module, nn.ModuleList) and (layers := _blocks_of(module, name))
    ]
    attends = [one for one in found if one[0][0].attention is not None]
    return next(iter(attends or found), None)


def _projector(hf_model: Any, towers: dict[str, tuple[str, ...]]) -> Iterator[Stack]:
    """What stands between towers and decoder and has neurons, if anything does."""
    decoder = decoder_of(hf_model)
    others = [decoder, *(part(hf_model, tower) for tower in towers)]
    for path, module in _outside(hf_model, decoder):
        within = next((tower for tower in towers if path.startswith(f"{tower}.")), None)
        if within is None and any(name.endswith("_tower") for name in path.split(".")):
            continue  # of a medium that has no encoder of its own by the model's account
        media = towers[within] if within else tuple(m for ms in towers.values() for m in ms)
        blocks, layers = None, tuple[Layer, ...]()
        if isinstance(module, nn.ModuleList):
            if within is None:
                blocks, layers = path, _blocks_of(module, path)
        elif (names := mlp_names(module)) is not None:
            alike = (one for one in _alike(hf_model, decoder, module) if one != path)
            layers = tuple(_layer(part(hf_model, one), names, one) for one in (path, *alike))
        if layers:
            yield Stack("projector", _whole(hf_model, path, others), media, layers, blocks)
            return


def _alike(hf_model: Any, decoder: Any, module: Any) -> Iterator[str]:
    """Names of modules of the same kind in lists outside the decoder.

    Qwen3-VL's DeepStack merges what some blocks of the tower make as its projector does, and hands
    it to the decoder's first layers.
    """
    for path, outside in _outside(hf_model, decoder):
        if isinstance(outside, nn.ModuleList):
            for name, child in children(outside).items():
                if type(child) is type(module):
                    yield joined(path, name)


def _blocks_of(blocks: nn.ModuleList, path: str) -> tuple[Layer, ...]:
    found = [layer_of(block, joined(path, n)) for n, block in children(blocks).items()]
    return tuple(layer for layer in found if layer is not None)


def _whole(hf_model: Any, path: str, others: list[Any]) -> str:
    """The outermost module around a place that holds none of the others."""
    names = path.split(".")
    for count in range(1, len(names)):
        outer = ".".join(names[:count])
        if not any(_holds(part(hf_model, outer), other) for other in others):
            return outer
    return path


def _outside(module: Any, decoder: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Modules outside the decoder; lists by themselves, without what is in them."""
    yield path, plain(module)
    for name, child in children(module).items():
        if _holds(decoder, child) or isinstance(plain(module), nn.ModuleList):
            continue
        yield from _outside(child, decoder, joined(path, name))


def _holds(outer: Any, inner: Any) -> bool:
    return any(module is inner for _, module in walk(outer))

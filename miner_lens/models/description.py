"""What was found in a model, and what was not."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from miner_lens.models import attention
from miner_lens.models.access import layout
from miner_lens.models.bridge import prepared_bridge
from miner_lens.models.experts import ExpertProjection
from miner_lens.models.inside import hf_model_of, model_name
from miner_lens.models.modality import media_tokens
from miner_lens.models.sites import Site, Tower, sites
from miner_lens.models.structure import decoder_of, walk

NO_ATTENTION = (
    "{site}: queries and keys after RoPE cannot be read{why}, so attn_k and attn_q cannot be "
    "scored. "
    'prob, mean and max can: metrics=("prob", "mean", "max").'
)


@dataclass(frozen=True)
class SiteDescription:
    """Neurons of one part of a model.

    Attributes:
        name: `"llm"`, `"vision"`, `"audio"` or `"projector"`.
        layers: Number of layers that have neurons.
        neurons: Number of neurons in each layer; in the widest, where layers differ.
        modalities: What occurs there.
        x: TransformerLens hook point of X, `{i}` being the layer.
        attention: Hook points of queries and keys after RoPE; none where there is no attention.
        experts: How many experts share a layer's neurons, one after the other; None without any.
        units: How many neurons each expert has; None without any.
        widths: Number of neurons of each layer, where layers differ.
    """

    name: str
    layers: int
    neurons: int
    modalities: tuple[str, ...]
    x: str
    attention: tuple[str, ...]
    experts: int | None = None
    units: int | None = None
    widths: tuple[int, ...] | None = None

    @property
    def per_layer(self) -> str:
        """How many neurons layers have, in words.

        Example:
            >>> SiteDescription("llm", 4, 96, (), "", (), 4, 24, (48, 48, 96, 48)).per_layer
            '96 (layers 0-1, 3: 48)'
        """
        if self.widths is None:
            return str(self.neurons)
        fewer = sorted(set(self.widths) - {self.neurons})
        others = [f"{_ranges(self.widths, n)}: {n}" for n in fewer]
        return f"{self.neurons} ({'; '.join(others)})"


@dataclass(frozen=True)
class ModelDescription:
    """What was read off a model; prints itself.

    Attributes:
        name: Hub id or folder.
        architecture: Class name of the Hugging Face model.
        adapter: Class name of its TransformerLens adapter.
        sites: Where its neurons live.
        media: The placeholder token of each medium.
        delimiters: How many tokens are known to be neither text nor a medium.
        missing: What is not there, and why, in sentences.
    """

    name: str
    architecture: str
    adapter: str
    sites: tuple[SiteDescription, ...]
    media: dict[str, int]
    delimiters: int
    missing: tuple[str, ...]

    @property
    def details(self) -> tuple[str, ...]:
        """Lines that say where to read and what is missing."""
        hooks = [f"{site.name}: {', '.join((site.x, *site.attention))}" for site in self.sites]
        shared = [
            f"{site.name}: {site.experts} experts of {site.units} neurons each"
            for site in self.sites
            if site.experts
        ]
        tokens = ", ".join(f"{medium} {token}" for medium, token in self.media.items())
        return (
            f"adapter: {self.adapter}",
            *hooks,
            *shared,
            f"placeholders: {tokens or 'none'}; delimiters: {self.delimiters} tokens",
            *(f"missing: {one}" for one in self.missing),
        )

    def __str__(self) -> str:
        sizes = [f"{site.name}: {site.layers} x {site.per_layer}" for site in self.sites]
        return "\n".join([f"{self.name} ({self.architecture})", *sizes, *self.details])


def describe(model: Any) -> ModelDescription:
    """Say which sites, neurons, hook points and modalities were found in a model.

    Args:
        model: A `TransformerBridge`.

    Raises:
        ValueError: It is none.
    """
    bridge = prepared_bridge(model)
    hf_model = hf_model_of(bridge)
    missing: list[str] = []
    try:
        known = layout(bridge)
    except ValueError as error:
        known = None
        missing.append(f"modalities: {error}")
    media = dict(known.media) if known else media_tokens(hf_model.config)
    found, there = [], set(bridge.hook_dict)
    if attention.unreadable(bridge):
        layers = range(len(bridge.blocks))
        there -= {point for n in layers for point in attention.rotated_points(bridge, n)}
    for place in sites(hf_model).values():
        modalities = ("text", "special", *media) if place.name == "llm" else ()
        try:
            found.append(_described(place, bridge, there, modalities))
        except ValueError as error:
            missing.append(f"{place.name}: {error}")
    missing += _missing(bridge, {site.name: site for site in found}, media)
    return ModelDescription(
        model_name(bridge),
        type(hf_model).__name__,
        type(bridge.adapter).__name__,
        tuple(found),
        media,
        len(known.special) if known else 0,
        tuple(missing),
    )


def _described(
    place: Site, bridge: Any, there: set[str], modalities: tuple[str, ...]
) -> SiteDescription:
    mlps = place.mlps(hf_model_of(bridge))
    if isinstance(place, Tower):
        modalities, points = place.modalities, place.attention_points(0)
    else:
        points = attention.rotated_points(bridge, 0)
    x = place.activation_point(0)
    if x not in there:
        raise ValueError(
            f"its activation function has no hook point ({x}), so that neurons can be neither read "
            "nor switched off"
        )
    attends = tuple(_any_layer(point) for point in points if point in there)
    widths = tuple(mlp.down.in_features for mlp in mlps)
    downs = [mlp.down for mlp in mlps if isinstance(mlp.down, ExpertProjection)]
    return SiteDescription(
        place.name,
        len(mlps),
        max(widths),
        modalities,
        _any_layer(x),
        attends,
        downs[0].count if downs else None,
        downs[0].in_features // downs[0].count if downs else None,
        widths if min(widths) < max(widths) else None,
    )


def _ranges(widths: Sequence[int], width: int) -> str:
    """The layers of a width, consecutive ones as a range."""
    layers = [layer for layer, own in enumerate(widths) if own == width]
    # Of consecutive layers, the number less the place is the same.
    runs = [[n for _, n in run] for _, run in groupby(enumerate(layers), lambda p: p[1] - p[0])]
    named = [str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs]
    return f"layer{'s' if len(layers) > 1 else ''} {', '.join(named)}"


def _any_layer(point: str) -> str:
    return point.replace(".0.", ".{i}.", 1)


def _missing(
    bridge: Any, found: dict[str, SiteDescription], media: dict[str, int]
) -> Iterator[str]:
    seen = {medium for site in found.values() if site.name != "llm" for medium in site.modalities}
    for medium in media.keys() - seen:
        yield (
            f"a tower for {medium}: the model names no encoder of it, or one without an activation "
            "function between two linear layers."
        )
    if media and "projector" not in found:
        yield "projector: it has no activation function between two linear layers, so no neurons."
    for name, site in found.items():
        if name != "projector" and not site.attention:
            why = attention.unreadable(bridge) if name == "llm" else None
            yield NO_ATTENTION.format(site=name, why=f" ({why})" if why else "")
    if any("shared_expert" in name for name, _ in walk(decoder_of(hf_model_of(bridge)))):
        yield "llm: shared experts, which see every token; only neurons of routed ones are counted."
    if attention.rebuilt(attention.attentions_of(bridge)):
        yield (
            "llm: TransformerLens rebuilds attention, so logits equal Hugging Face's up to "
            "rounding, and mining takes more memory."
        )

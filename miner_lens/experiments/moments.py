"""Prompts in which a neuron fires, with what is needed to show them: tokens, pictures, sounds."""

from __future__ import annotations

import io
from base64 import b64encode
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from math import isqrt
from typing import Any

import numpy as np
from torch import Tensor

from miner_lens.analyzers.top_activations import TokenActivations, TokenActivationsAnalyzer
from miner_lens.data.media import load_media
from miner_lens.data.sample import Sample
from miner_lens.data.sounds import sound_rate
from miner_lens.models.forcing import tokenizer_of
from miner_lens.models.inside import processor_of
from miner_lens.running.run import run

# Pixels of a thumbnail's longer side, and points of a sound's outline.
THUMBNAIL = 192
OUTLINE = 160


@dataclass(frozen=True)
class Medium:
    """A picture, video or sound of a prompt, and which tokens stand for it.

    Attributes:
        kind: `image`, `video` or `audio`.
        positions: The tokens' positions.
        grid: (frames, rows, columns) of the tokens, where they lie on a grid.
        picture: A thumbnail as a data URI; of a video, none.
        outline: Of a sound, the largest amplitude in each stretch of equal length.
        seconds: How long a sound lasts.
    """

    kind: str
    positions: Sequence[int]
    grid: tuple[int, int, int] | None = None
    picture: str | None = None
    outline: Sequence[float] = field(default_factory=list)
    seconds: float | None = None


@dataclass(frozen=True)
class Moment:
    """A prompt in which a neuron fires.

    Attributes:
        sample: The sample's name.
        label: Its label.
        peak: The position at which X is largest.
        tokens: The prompt, token by token.
        modalities: What each token is, such as `image`.
        activations: X at each token.
        written: X times the up projection at each token; None where that cannot be read.
        media: What the placeholder tokens stand for.
    """

    sample: str
    label: str | None
    peak: int
    tokens: Sequence[str]
    modalities: Sequence[str]
    activations: Sequence[float]
    written: Sequence[float] | None
    media: Sequence[Medium]

    @property
    def value(self) -> float:
        """X at the peak."""
        return self.activations[self.peak]

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON can hold them."""
        return asdict(self)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Moment:
        """What `to_dict` gave, also after it was JSON."""
        media = [Medium(**{**one, "grid": _grid(one["grid"])}) for one in fields["media"]]
        return cls(**{**fields, "media": media})


def moment(
    model: Any, sample: Sample, name: str, layer: int, neuron: int, progress: bool = False
) -> Moment:
    """What a neuron does at each token of a sample's prompt, in one pass."""
    analyzer = TokenActivationsAnalyzer(layer, neuron)
    found: TokenActivations = run(model, [sample], analyzer, progress=progress)
    modalities = ["text"] * len(found.ids)
    for modality in ("special", "image", "video", "audio"):
        for position in _positions(found.masks.get(modality)):
            modalities[position] = modality
    return Moment(
        sample=name,
        label=sample.label,
        peak=int(found.activations.argmax()),
        tokens=tokenizer_of(model).batch_decode(found.ids[:, None].tolist()),
        modalities=modalities,
        activations=found.activations.tolist(),
        written=None if found.written is None else found.written.tolist(),
        media=list(_media(model, sample, found)),
    )


def _grid(sizes: Sequence[int] | None) -> tuple[int, int, int] | None:
    if sizes is None:
        return None
    frames, rows, columns = sizes
    return frames, rows, columns


def _positions(mask: Tensor | None) -> list[int]:
    return [] if mask is None else mask.nonzero()[:, 0].tolist()


def _media(model: Any, sample: Sample, found: TokenActivations) -> Iterator[Medium]:
    processor = processor_of(model)
    contents = [one["content"] for one in load_media(sample.messages, processor)]
    parts = [part for content in contents if not isinstance(content, str) for part in content]
    for kind in ("image", "video", "audio"):
        given = [part[kind] for part in parts if part["type"] == kind]
        positions = _positions(found.masks.get(kind))
        if not given or not positions:
            continue
        start = 0
        for medium, (count, grid) in zip(
            given, _shares(kind, len(given), len(positions), found), strict=True
        ):
            own = positions[start : start + count]
            start += count
            if kind == "image":
                yield Medium(kind, own, grid, picture=_thumbnail(medium))
            elif kind == "video":
                yield Medium(kind, own, grid)
            else:
                seconds = len(medium) / sound_rate(processor)
                yield Medium(kind, own, outline=_outline(medium), seconds=seconds)


def _shares(
    kind: str, items: int, tokens: int, found: TokenActivations
) -> list[tuple[int, tuple[int, int, int] | None]]:
    """How many tokens each item of a kind has, and their grid where it is known.

    Where the model's inputs have no grid, items share the tokens equally, and those of an image
    are a square if their number is one.
    """
    grids = found.grids.get(kind, [])
    patches = sum(f * r * c for f, r, c in grids)
    side = isqrt(patches // tokens)
    if len(grids) == items and patches == tokens * side**2:
        merged = [(f, r // side, c // side) for f, r, c in grids]
        return [(f * r * c, (f, r, c)) for f, r, c in merged]
    each, side = tokens // items, isqrt(tokens // items)
    grid = (1, side, side) if kind == "image" and side**2 == each else None
    return [(each, grid)] * items


def _thumbnail(image: Any) -> str:
    small = image.copy()
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    file = io.BytesIO()
    small.save(file, format="PNG", optimize=True)
    return "data:image/png;base64," + b64encode(file.getvalue()).decode()


def _outline(sound: np.ndarray) -> list[float]:
    stretches = np.array_split(np.abs(sound), min(OUTLINE, len(sound)))
    return [round(float(one.max()), 4) for one in stretches]

"""Which image, frame or clip a row of a tower belongs to, and which sample that is.

A tower gets the media of a whole batch in one heap. How many rows and tokens each of them has is
read off the model's inputs: a grid of patches, sizes in pixels, lengths in frames, or, where a
family resizes everything to one size, nothing at all. Where a family cuts media into parts that
its inputs do not count, an installed package says so (`ENTRY_POINTS`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from miner_lens.installed import described
from miner_lens.models.structure import plain

ENTRY_POINTS = "miner_lens.items"

# What Hugging Face calls a medium among a model's inputs.
MEDIA_INPUTS = {
    "image": "pixel_values",
    "video": "pixel_values_videos",
    "audio": "input_features",
}


@dataclass(frozen=True)
class Rows:
    """What the rows of a tower's activations are, X being flattened to [row neuron].

    Attributes:
        real: False at padding.
        items: Which image, video or clip of the call each row belongs to, rising from 0.
    """

    real: Bool[Tensor, " row"]
    items: Int[Tensor, " row"]


@dataclass(frozen=True)
class Items:
    """The images, videos or clips that a tower gets in one call, in order.

    Attributes:
        tokens: How many placeholder tokens each fills; None: equally many.
        sizes: How many rows each has, or in what proportion; after a projector there are fewer.
        real: Where rows may be padding, those that are not, [row].
    """

    tokens: Sequence[int] | None
    sizes: Sequence[int]
    real: Bool[Tensor, " row"] | None = None

    def rows(self, count: int) -> Rows:
        """What so many rows are.

        Raises:
            ValueError: The items cannot have so many rows.
        """
        if self.real is not None and len(self.real) == count:
            # Padding fills all of them up to one size.
            sizes = torch.full((len(self.sizes),), count // len(self.sizes))
            return Rows(self.real, _numbers(sizes))
        sizes = torch.tensor(self.sizes)
        total = int(sizes.sum())
        shares = sizes * count
        if not total or bool((shares % total).any()):
            raise ValueError(
                f"A tower gives {count} rows for {len(self.sizes)} media of sizes "
                f"{', '.join(map(str, self.sizes))}, so it is not known whose they are. A function "
                f"in the entry-point group {ENTRY_POINTS!r} can say."
            )
        return Rows(torch.ones(count, dtype=torch.bool), _numbers(shares // total))


def _numbers(sizes: Int[Tensor, " item"]) -> Int[Tensor, " row"]:
    return torch.arange(len(sizes)).repeat_interleave(sizes)


def items_of(hf_model: Any, tower: Any, inputs: Mapping[str, Any], modality: str) -> Items:
    """What a tower is given of a medium, from the model's inputs. This may wait for the device.

    Args:
        hf_model: The Hugging Face model.
        tower: The encoder of the medium.
        inputs: The model's inputs.
        modality: `"image"`, `"video"` or `"audio"`, which is among the inputs.
    """
    of_family = described(ENTRY_POINTS, type(hf_model).__name__)
    known: Items | None = None if of_family is None else of_family(hf_model, inputs, modality)
    if known is not None:
        return known
    given: Tensor = inputs[MEDIA_INPUTS[modality]]
    grid = inputs.get(f"{modality}_grid_thw")
    if grid is not None:
        sizes = grid.prod(-1).cpu()
        return Items((sizes // _merged(tower)).tolist(), sizes.tolist())
    mask = inputs.get("feature_attention_mask")
    if modality == "audio" and mask is not None:
        return _clips(tower, mask)
    return Items(None, [1] * len(given))


def _clips(tower: Any, mask: Tensor) -> Items:
    # The name that transformers' audio encoders give it.
    lengths: Any = plain(tower)._get_feat_extract_output_lengths
    frames, tokens = (one.tolist() for one in lengths(mask.sum(-1).cpu()))
    longest, _ = lengths(torch.tensor(mask.shape[-1]))
    real = torch.arange(int(longest)) < torch.tensor(frames)[:, None]
    return Items(tokens, frames, real.flatten())


def _merged(tower: Any) -> int:
    """How many patches become one token, where a grid of them is given."""
    return int(plain(tower).config.spatial_merge_size) ** 2


def rows_of_call(tower: Any, arguments: Mapping[str, Any], shape: Sequence[int]) -> Rows:
    """What the rows are in one call of a tower, from the arguments of that call alone.

    Where an image is cut into tiles, or a video into frames, each of which the tower sees by
    itself, these are the items.

    Args:
        tower: The module that is called.
        arguments: The arguments by name.
        shape: Of X, [item row neuron] or [row neuron], in the tower or after it.
    """
    count = int(torch.Size(shape[:-1]).numel())
    grid = arguments.get("grid_thw")
    if isinstance(grid, Tensor):
        sizes = grid.prod(-1).cpu()
        return Items(None, sizes.tolist()).rows(count)
    lengths = arguments.get("feature_lens")
    if isinstance(lengths, Tensor):
        frames, _ = plain(tower)._get_feat_extract_output_lengths(lengths.cpu())
        return Items(None, frames.tolist()).rows(count)
    pixels = arguments.get("image_sizes")
    heap = len(shape) == 2 or shape[0] == 1
    if pixels is not None and heap:
        side = plain(tower).config.patch_size
        sizes = torch.as_tensor(pixels).cpu() // side
        return Items(None, sizes.prod(-1).tolist()).rows(count)
    given = next(value for value in arguments.values() if isinstance(value, Tensor))
    items = len(given) if heap else shape[0]
    return Items(None, [1] * items, _visible(arguments, items, count)).rows(count)


def _visible(arguments: Mapping[str, Any], items: int, count: int) -> Tensor | None:
    """The rows that are not padding, where the tower is told of them."""
    for name, mask in arguments.items():
        if not name.endswith("attention_mask") or not isinstance(mask, Tensor):
            continue
        # Every query sees an item's real rows: the mask says which, or how much to add.
        seen = mask[:, 0, 0] if mask.ndim == 4 else mask
        if seen.is_floating_point():
            seen = seen >= 0
        if seen.numel() == count and len(seen) == items:
            return seen.bool().flatten().cpu()
    return None


def owners(placeholders: Sequence[int], sizes: Sequence[int]) -> tuple[int, ...]:
    """Which sample each item belongs to: samples take as many items as fill their placeholders.

    Args:
        placeholders: Number of placeholder tokens in each sample.
        sizes: Number of tokens that each item fills, in order.

    Raises:
        ValueError: The items do not fill the placeholders.

    Example:
        >>> owners([4, 0, 3], [2, 2, 3])
        (0, 0, 2)
    """
    result: list[int] = []
    left, fitting = list(sizes), True
    for sample, wanted in enumerate(placeholders):
        while wanted > 0 and left:
            wanted -= left.pop(0)
            result.append(sample)
        fitting = fitting and wanted == 0
    if left or not fitting:
        raise ValueError(
            f"The prompts have {sum(placeholders)} placeholder tokens "
            f"({', '.join(map(str, placeholders))}), and the media fill {sum(sizes)} "
            f"({', '.join(map(str, sizes))})."
        )
    return tuple(result)

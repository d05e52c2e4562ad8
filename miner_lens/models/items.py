"""Which image, frame or clip a row of a tower belongs to, and which sample that is.

A tower gets the media of a whole batch in one heap. How many rows and tokens each of them has is
read off the model's inputs: a grid of patches, sizes in pixels, lengths in frames, or, where a
family resizes everything to one size, nothing at all. Where a family cuts media into parts that
its inputs do not count, an installed package says so (`ENTRY_POINTS`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from miner_lens.installed import described
from miner_lens.models.forward_pass import MASKED
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
        tokens: How many placeholder tokens each fills; None: that is not known.
        sizes: How many rows each has, or in what proportion; after a projector there are fewer.
        real: Where rows may be padding, those that are not, [row].
    """

    tokens: Sequence[int] | None
    sizes: Sequence[int]
    real: Bool[Tensor, " row"] | None = None

    def rows(self, shape: Sequence[int]) -> Rows:
        """What the rows of X are.

        Args:
            shape: Of X, [item row neuron], or [row neuron] in one heap.

        Raises:
            ValueError: The items cannot have so many rows.
        """
        count = int(torch.Size(shape[:-1]).numel())
        if self.real is not None and count % len(self.sizes) == 0:
            # Padding fills all of them up to one size.
            longest = count // len(self.sizes)
            numbers = _numbers(torch.full((len(self.sizes),), longest))
            if len(self.real) == count:
                return Rows(self.real, numbers)
            apart = len(shape) > 2 and shape[0] == len(self.sizes)
            if apart and self.tokens is not None and longest >= max(self.tokens):
                # After the tower, where rows are those of tokens.
                tokens = torch.tensor(self.tokens)[:, None]
                return Rows((torch.arange(longest) < tokens).flatten(), numbers)
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


def items_of(hf_model: Any, tower: Any, inputs: Mapping[str, Any], modality: str) -> Items | None:
    """What a tower is given of a medium, as far as the model's inputs say; None: only its call can.

    This may wait for the device.

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
    grid = inputs.get(f"{modality}_grid_thw")
    if grid is not None:
        sizes = grid.prod(-1).cpu()
        return Items((sizes // _merged(tower)).tolist(), sizes.tolist())
    masks = masks_beside(inputs, inputs[MEDIA_INPUTS[modality]])
    if modality == "audio" and masks:
        return _clips(tower, *masks.values())
    return None


def _clips(tower: Any, *masks: Tensor) -> Items | None:
    mask = masks[0].flatten(0, -2)
    counted = _frames_and_tokens(tower, mask.sum(-1).cpu())
    longest = _frames_and_tokens(tower, torch.tensor(mask.shape[-1]))
    if counted is None or longest is None:
        return None
    frames, tokens = counted
    real = torch.arange(int(longest[0])) < frames[:, None]
    return Items(tokens.tolist(), frames.tolist(), real.flatten())


def _frames_and_tokens(tower: Any, lengths: Tensor) -> tuple[Tensor, Tensor] | None:
    # The name that transformers' audio encoders give it; a few return one length and not two.
    count: Any = getattr(plain(tower), "_get_feat_extract_output_lengths", None)
    counted = None if count is None else count(lengths)
    return counted if isinstance(counted, tuple) else None


def _merged(tower: Any) -> int:
    """How many patches become one token, where a grid of them is given."""
    return int(plain(tower).config.spatial_merge_size) ** 2


def masks_beside(inputs: Mapping[str, Any], medium: Tensor) -> dict[str, Tensor]:
    """The masks of a medium among the inputs of a model or tower, which also have the medium.

    They are 0 and 1, and of some of the medium's own axes.
    """
    of_tokens = getattr(inputs.get("input_ids"), "shape", None)
    masks = {}
    for name, value in inputs.items():
        if not isinstance(value, Tensor) or value.shape == of_tokens:
            continue
        axes, fewer = iter(medium.shape[1:]), 1 < value.ndim < medium.ndim
        of_items = fewer and len(value) == len(medium)
        if of_items and all(size in axes for size in value.shape[1:]) and _binary(value):
            masks[name] = value
    return masks


def _binary(value: Tensor) -> bool:
    return value.dtype == torch.bool or bool(((value == 0) | (value == 1)).all())


def rows_of_call(tower: Any, calls: Sequence[Mapping[str, Any]], shape: Sequence[int]) -> Rows:
    """What the rows are in one call of a tower, from the arguments of that call alone.

    Where an image is cut into tiles, or a video into frames, each of which the tower sees by
    itself, these are the items.

    Args:
        tower: The module that is called.
        calls: The arguments by name: the tower's, and those of calls within it.
        shape: Of X, [item row neuron] or [row neuron], in the tower or after it.
    """
    arguments, count = calls[0], int(torch.Size(shape[:-1]).numel())
    grid = arguments.get("grid_thw")
    if isinstance(grid, Tensor):
        sizes = grid.prod(-1).cpu()
        return Items(None, sizes.tolist()).rows(shape)
    lengths = arguments.get("feature_lens")
    counted = _frames_and_tokens(tower, lengths.cpu()) if isinstance(lengths, Tensor) else None
    if counted is not None:
        return Items(None, counted[0].tolist()).rows(shape)
    pixels = arguments.get("image_sizes")
    heap = len(shape) == 2 or shape[0] == 1
    if pixels is not None and heap:
        side = plain(tower).config.patch_size
        sizes = torch.as_tensor(pixels).cpu() // side
        return Items(None, sizes.prod(-1).tolist()).rows(shape)
    given = next(value for value in arguments.values() if isinstance(value, Tensor))
    items = len(given) if heap else shape[0]
    rows = Items(None, [1] * items, visible(calls, items, count)).rows(shape)
    require_read(rows, masks_beside(arguments, given))
    return rows


def visible(calls: Sequence[Mapping[str, Any]], items: int, count: int) -> Tensor | None:
    """The rows that are not padding, where a call is told of them; None where none is.

    Args:
        calls: The arguments by name, of a tower's call and of calls within it.
        items: How many items there are.
        count: How many rows all of them have, padding included.
    """
    for arguments in calls:
        for name, mask in arguments.items():
            if isinstance(mask, Tensor):
                real = _real(name, mask, items, count)
                if real is not None:
                    return real.flatten().cpu()
    return None


def _real(name: str, mask: Tensor, items: int, count: int) -> Tensor | None:
    """The real rows by an argument, [item row], if it is a mask of so many items and rows."""
    if not items or count % items:
        return None
    rows = count // items
    if mask.ndim == 4 and mask.shape[-1] == rows and mask.shape[2] in (1, rows):
        # What a query sees, or how much is added; padding is seen by none.
        if mask.is_floating_point():
            hidden = mask <= MASKED
            mask = ~hidden if bool((hidden | (mask == 0)).all()) else mask
        if mask.dtype == torch.bool and len(mask) in (1, items):
            return mask.flatten(1, 2).any(1).expand(items, rows)
    elif (
        len(mask) == items
        and mask.numel() == count
        and (mask.dtype == torch.bool or ("mask" in name and _binary(mask)))
    ):
        return mask.bool().reshape(items, rows)
    return None


def require_read(rows: Rows, masks: Mapping[str, Tensor]) -> None:
    """Refuse masks of media that hide rows of which none is known to be padding.

    Args:
        rows: What the rows of a call are thought to be.
        masks: The masks beside the medium among the model's inputs.

    Raises:
        ValueError: There is such a mask.
    """
    sizes = rows.items.bincount()
    if not masks or not bool(rows.real.all()):
        return
    per_item = int(sizes.max())
    for name, mask in masks.items():
        # Or it counts media, and those that fill up a sample are left out.
        read = bool(mask.all()) or int(mask.sum()) == len(sizes) < mask.numel()
        if not read and _hides(mask, per_item):
            raise ValueError(
                f"The input {name!r} says that a part of the media is padding, but not which of "
                f"the {per_item} rows that the tower makes of each. Give media of one size, so "
                "that nothing is padded, or mine another site; a function in the entry-point group "
                f"{ENTRY_POINTS!r} can say."
            )


def _hides(mask: Tensor, rows: int) -> bool:
    """Whether a mask hides all of what some row is made of, but for the last one's rounding."""
    units = mask.float().cpu()
    if mask.ndim == 2:  # [item time], or [item patch]
        seen = torch.nn.functional.adaptive_max_pool1d(units[:, None], rows)[:, 0]
        return bool((seen[:, :-1] == 0).any())
    height, width = units.shape[-2:]
    pictures = units.reshape(-1, height, width)
    pictures = pictures[pictures.flatten(1).any(1)]  # those that fill up a sample are left out
    for patches in (rows, rows - 1):  # or with a class token
        side = math.isqrt(height * width // max(1, patches))
        if side and side * side * patches == height * width and not (height % side + width % side):
            grid = (height // side, width // side)
            seen = torch.nn.functional.adaptive_max_pool2d(pictures[:, None], grid)
            return bool((seen == 0).any())
    return True


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


def rows_of_tokens(placeholders: Sequence[int]) -> tuple[Rows, tuple[int, ...]]:
    """Rows of which each fills one placeholder: what belongs to a sample is one item.

    Args:
        placeholders: Number of placeholder tokens in each sample.
    """
    samples = tuple(sample for sample, tokens in enumerate(placeholders) if tokens)
    numbers = _numbers(torch.tensor([placeholders[sample] for sample in samples]))
    return Rows(torch.ones(len(numbers), dtype=torch.bool), numbers), samples


def _whole(tokens: Tensor) -> list[int]:
    if not bool((tokens == tokens.round()).all()):
        raise ValueError("no whole numbers of tokens")
    return tokens.long().tolist()


def owners_of_rows(
    placeholders: Sequence[int], rows: Rows, media: int
) -> tuple[Rows, tuple[int, ...]]:
    """Whose the items of a call are that do not say how many tokens they fill.

    Args:
        placeholders: Number of placeholder tokens in each sample.
        rows: What the rows of the call are.
        media: How many media the model was given; items may be parts of them, as frames are.

    Returns:
        The rows, with whole media for items where only these fill the placeholders, and the sample
        of each item.

    Raises:
        ValueError: The items cannot fill the placeholders, or can in several ways.
    """
    count = int(rows.items[-1]) + 1
    wanted = [sample for sample, tokens in enumerate(placeholders) if tokens]
    if len(wanted) == 1:
        return rows, (wanted[0],) * count
    ways: dict[tuple[int, ...], tuple[Rows, tuple[int, ...]]] = {}
    for parts in {1, count // media if count % media == 0 else 1}:
        whole = Rows(rows.real, rows.items // parts)
        sizes = torch.zeros(count // parts).index_add(0, whole.items, whole.real.float())
        # Media fill equally many tokens where a family resizes them, or as many as they are large.
        for weights in (torch.ones_like(sizes), sizes):
            tokens = sum(placeholders) * weights / weights.sum().clamp(min=1)
            with suppress(ValueError):
                samples = owners(placeholders, _whole(tokens))
                ways[tuple(torch.tensor(samples)[whole.items].tolist())] = whole, samples
    if len(ways) == 1:
        return next(iter(ways.values()))
    how = "in several ways" if ways else "in no way that is known"
    raise ValueError(
        f"The prompts have {sum(placeholders)} placeholder tokens "
        f"({', '.join(map(str, placeholders))}), which {count} media can fill {how}, so it is not "
        "known whose they are. Take batch_size=1, or media of one size."
    )

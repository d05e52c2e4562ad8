"""Families that cut images into parts in ways that model inputs do not count."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping
from typing import Any

import torch

from miner_lens.models.items import Items


def any_resolution(hf_model: Any, inputs: Mapping[str, Any], modality: str) -> Items | None:
    """LLaVA-NeXT and LLaVA-OneVision: an image is a few tiles, which fill a size of its own."""
    if modality != "image":
        return None
    model, config, sizes = hf_model.model, hf_model.config, inputs["image_sizes"].cpu()
    side, count = config.vision_config.image_size, inputs.get("batch_num_images")
    # Several images of one prompt are not cut.
    whole = [] if count is None else [n > 1 for n in count.tolist() for _ in range(n)]
    cut: Any = vars(sys.modules[type(model).__module__])["image_size_to_num_patches"]
    tiles = [
        1 if whole and whole[number] else cut(size, config.image_grid_pinpoints, side)
        for number, size in enumerate(sizes)
    ]
    patches = (side // config.vision_config.patch_size) ** 2
    named = {"vision_feature_select_strategy": config.vision_feature_select_strategy}
    takes = inspect.signature(model.pack_image_features).parameters
    # The model's own arithmetic, on features of no width.
    packed, *_ = model.pack_image_features(
        image_features=[torch.empty(n, patches, 1, device="meta") for n in tiles],
        image_sizes=sizes,
        image_newline=torch.empty(1, device="meta"),
        **{name: value for name, value in named.items() if name in takes},
    )
    return Items([len(one) for one in packed], tiles)


def any_size(hf_model: Any, inputs: Mapping[str, Any], modality: str) -> Items | None:
    """Pixtral's tower, as Mistral 3 has it: an image has as many patches as it is large."""
    config = hf_model.config
    patches = inputs["image_sizes"].cpu() // config.vision_config.patch_size
    tokens = patches // config.spatial_merge_size
    return Items(tokens.prod(-1).tolist(), patches.prod(-1).tolist())

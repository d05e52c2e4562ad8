"""Stage 1: which token belongs to which modality."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

MODALITIES = ("text", "special", "special_text", "image", "video", "audio", "prompt")
ENTRY_POINTS = "miner_lens.modalities"

# Modalities that are others put together, which never overlap.
UNIONS = {
    "special_text": ("text", "special"),
    "prompt": ("text", "special", "image", "video", "audio"),
}

Masks = dict[str, Bool[Tensor, "batch pos"]]


@dataclass(frozen=True)
class ModalityLayout:
    """How a model family marks modalities in its token sequence.

    A family's adapter fills this in; see "Adding a model family" in the documentation.

    Attributes:
        media: The placeholder token that stands for each position of a medium, by modality:
            `{"image": 151655, "video": 151656}`.
        special: Chat and media delimiters, such as `<|im_start|>` or `<|vision_end|>`.

    Example:
        >>> layout = ModalityLayout({"image": 9}, special=frozenset({1, 2}))
        >>> masks = layout.masks(torch.tensor([[1, 9, 9, 2, 5]]))
        >>> masks["image"].int().tolist(), masks["text"].int().tolist()
        ([[0, 1, 1, 0, 0]], [[0, 0, 0, 0, 1]])
    """

    media: Mapping[str, int] = field(default_factory=dict)
    special: frozenset[int] = frozenset()

    def masks(
        self,
        input_ids: Int[Tensor, "batch pos"],
        attention_mask: Tensor | None = None,
    ) -> Masks:
        """Say for each token to which modalities it belongs.

        Args:
            input_ids: Token ids with placeholders already expanded, as a processor gives them.
            attention_mask: 1 for a real token, 0 for padding; padding belongs to no modality.

        Returns:
            `text`, `special`, their union `special_text`, one mask for each medium, and
            `prompt` (every real token): the token sets of MINER, stage 1.
        """
        real = torch.ones_like(input_ids, dtype=torch.bool)
        if attention_mask is not None:
            real = attention_mask.to(torch.bool)
        special = torch.isin(input_ids, input_ids.new_tensor(sorted(self.special))) & real
        media = {name: (input_ids == token) & real for name, token in self.media.items()}
        text = real & ~special
        for mask in media.values():
            text = text & ~mask
        masks = {"text": text, "special": special, "special_text": text | special}
        return masks | media | {"prompt": real}


def parts_of(masks: Masks) -> list[tuple[int, ...]]:
    """For each mask the places of those that it is made of without overlap, or its own.

    Masks may be anybody's, so whether a modality is made of its parts is looked up; this waits
    for a device once for each of `UNIONS`.

    Example:
        >>> text, special = torch.tensor([[True, False]]), torch.tensor([[False, True]])
        >>> parts_of({"text": text, "special": special, "special_text": text | special})
        [(0,), (1,), (0, 1)]
    """
    names = list(masks)
    result = []
    for place, (name, mask) in enumerate(masks.items()):
        parts = [part for part in UNIONS.get(name, ()) if part in masks]
        made_of = sum(
            (masks[part].int() for part in parts), torch.zeros_like(mask, dtype=torch.int)
        )
        fits = bool(parts) and torch.equal(made_of, mask.int())
        result.append(tuple(map(names.index, parts)) if fits else (place,))
    return result


def layout_for(architecture: str, config: Any, tokenizer: Any = None) -> ModalityLayout | None:
    """Find the modality layout that an installed package provides for a model class.

    Args:
        architecture: Hugging Face class name, such as `Qwen2VLForConditionalGeneration`.
        config: The model's Hugging Face config.
        tokenizer: Its tokenizer; without one, delimiters that only the tokenizer knows are
            counted as text.

    Returns:
        The layout; of a text model that no package describes, with the tokenizer's special tokens
        as delimiters. None for any other model that no package describes.
    """
    for entry in entry_points(group=ENTRY_POINTS, name=architecture):
        layout: ModalityLayout = entry.load()(config, tokenizer)
        return layout
    if tokenizer is not None and config.get_text_config() is config:
        added = tokenizer.added_tokens_decoder
        return ModalityLayout(special=frozenset(n for n, token in added.items() if token.special))
    return None

"""Stage 1: which token belongs to which modality."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from miner_lens.installed import described
from miner_lens.models.mistral import is_mistral

MODALITIES = ("text", "special", "special_text", "image", "video", "audio", "prompt")
MEDIA = ("image", "video", "audio")
ENTRY_POINTS = "miner_lens.modalities"

# What a config calls the tokens around media, beside `image_start_token_id` and so on.
_DELIMITERS = ("start", "end", "begin", "bos", "eos", "boi", "eoi", "boa", "eoa", "bov", "eov")

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


def media_tokens(config: Any) -> dict[str, int]:
    """The placeholder token of each medium, as a model's config names it, or that of an encoder.

    Example:
        >>> from types import SimpleNamespace
        >>> media_tokens(SimpleNamespace(image_token_id=9, audio_token_index=8))
        {'image': 9, 'audio': 8}
    """
    configs = [config, *(getattr(config, name, None) for name in ("vision_config", "audio_config"))]
    found = {}
    for medium in MEDIA:
        names = (f"{medium}_token_id", f"{medium}_token_index")
        tokens = (getattr(one, name, None) for one in configs for name in names)
        token = next((token for token in tokens if isinstance(token, int)), None)
        if token is not None:
            found[medium] = token
    return found


def delimiters(config: Any, tokenizer: Any = None) -> frozenset[int]:
    """Tokens that are neither text nor a medium: those around media, and chat delimiters.

    The config names the former (`vision_start_token_id`, `boi_token_index`, ...) and where a text
    begins and ends; all others are special tokens of the tokenizer.
    """
    ids: set[int] = set()
    for one in (config, config.get_text_config()):
        for name, value in one.to_dict().items():
            words = name.split("_")
            if words[-2:-1] == ["token"] and set(words) & set(_DELIMITERS):
                ids |= {t for t in (value if isinstance(value, list) else [value]) if _is_id(t)}
    if tokenizer is not None:
        if not is_mistral(tokenizer):  # which do not tell
            ids |= {n for n, token in tokenizer.added_tokens_decoder.items() if token.special}
        ids |= set(getattr(tokenizer, "all_special_ids", ()))
    return frozenset(ids - set(media_tokens(config).values()))


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and value >= 0


def layout_for(architecture: str, config: Any, tokenizer: Any = None) -> ModalityLayout | None:
    """The modality layout of a model class: an installed package's, or what the config says.

    Args:
        architecture: Hugging Face class name, such as `Qwen2VLForConditionalGeneration`.
        config: The model's Hugging Face config.
        tokenizer: Its tokenizer; without one, delimiters that only the tokenizer knows are
            counted as text.

    Returns:
        The layout; of a text model all tokens are text or special. None where the model takes
        media and neither its config nor a package says which tokens stand for them.
    """
    of_family = described(ENTRY_POINTS, architecture)
    if of_family is not None:
        layout: ModalityLayout = of_family(config, tokenizer)
        return layout
    media = media_tokens(config)
    if not media and config.get_text_config() is not config:
        return None
    return ModalityLayout(media, delimiters(config, tokenizer))

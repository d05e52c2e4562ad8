"""Random models with the layers of published checkpoints, and prompts for them.

The towers are cut to nothing or to one narrow block, and the vocabulary is small, so that what is
not a decoder layer hardly counts. Fewer layers than the checkpoint's are built: each layer costs
the same, so the ratios hold for the whole model.
"""

from __future__ import annotations

import copy
import inspect
import math
from dataclasses import dataclass
from typing import Any, Literal

import torch

import miner_lens as ml

VOCABULARY, MEDIUM, START, END = 1024, 1000, 1001, 1002
TEXT_TOKENS = 49
CLIP_SECONDS, CLIP_TOKENS, MEL_BINS = 30, 750, 128
Inputs = dict[str, Any]
Masks = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Shape:
    """What one decoder layer looks like, and which family it belongs to."""

    name: str
    family: Literal["qwen2_vl", "qwen2_audio"]
    hidden: int
    neurons: int
    heads: int
    kv_heads: int


VL_2B = Shape("Qwen2-VL-2B", "qwen2_vl", 1536, 8960, 12, 2)
AUDIO_7B = Shape("Qwen2-Audio-7B", "qwen2_audio", 4096, 11008, 32, 32)


def build(
    shape: Shape, layers: int, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> Any:
    """A random Hugging Face model with `layers` decoder layers of this shape."""
    torch.manual_seed(0)
    model = _vision_model(shape, layers) if shape.family == "qwen2_vl" else _audio(shape, layers)
    return model.to(device, dtype).eval()


def twin(model: Any) -> Any:
    """Another model on the same weights: one can be hooked while the other stays plain."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared)


def prompt(
    shape: Shape,
    pos: int,
    batch: int = 1,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> tuple[Inputs, Masks]:
    """Prompts of `pos` tokens, one image or clip and a question each, and their modalities.

    An image takes all but about 49 of the tokens, a clip of 30 seconds 750 of them.
    """
    generator = torch.Generator().manual_seed(0)
    if shape.family == "qwen2_vl":
        height = math.isqrt(pos - TEXT_TOKENS)
        width = (pos - TEXT_TOKENS) // height
        media_tokens = height * width
        patches = torch.randn(batch * 4 * media_tokens, 1176, generator=generator)
        media = {
            "pixel_values": patches.to(dtype),
            "image_grid_thw": torch.tensor([(1, 2 * height, 2 * width)] * batch),
        }
    else:
        media_tokens = CLIP_TOKENS
        sound = torch.randn(batch, MEL_BINS, 100 * CLIP_SECONDS, generator=generator)
        media = {
            "input_features": sound.to(dtype),
            "feature_attention_mask": torch.ones(batch, 100 * CLIP_SECONDS, dtype=torch.long),
        }
    words = torch.randint(0, MEDIUM, (batch, pos - media_tokens - 2), generator=generator)
    start, end = words.new_full((batch, 1), START), words.new_full((batch, 1), END)
    medium = words.new_full((batch, media_tokens), MEDIUM)
    ids = torch.cat([words[:, :10], start, medium, end, words[:, 10:]], 1)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **media}
    if shape.family == "qwen2_vl":
        inputs["mm_token_type_ids"] = (ids == MEDIUM).int()
    name = "image" if shape.family == "qwen2_vl" else "audio"
    masks = ml.ModalityLayout({name: MEDIUM}, frozenset({START, END})).masks(ids)
    inputs = {key: value.to(device) for key, value in inputs.items()}
    return inputs, {key: value.to(device) for key, value in masks.items()}


def prefill_options(model: Any) -> dict[str, Any]:
    """What mining asks of a forward pass, asked of every other pass here too.

    Logits of one position, where the model can be told so: projecting all of them on a
    vocabulary would make what is added on top look smaller.
    """
    options: dict[str, Any] = {"use_cache": False}
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        options["logits_to_keep"] = 1
    return options


def layer_flops(shape: Shape, pos: int) -> float:
    """Floating-point operations of one decoder layer on one prompt, attention not halved."""
    width = shape.hidden // shape.heads
    projections = 2 * shape.hidden * (shape.heads + shape.kv_heads) * width
    return 2.0 * pos * (projections + 3 * shape.hidden * shape.neurons + 2 * shape.hidden * pos)


def _decoder(shape: Shape, layers: int) -> dict[str, Any]:
    return {
        "vocab_size": VOCABULARY,
        "bos_token_id": None,
        "eos_token_id": None,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.neurons,
        "num_hidden_layers": layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
    }


def _vision_model(shape: Shape, layers: int) -> Any:
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    # Time, height and width turn a quarter and three eighths each of the rotary pairs.
    eighth = shape.hidden // shape.heads // 16
    rotary = {
        "rope_type": "default",
        "rope_theta": 1e6,
        "mrope_section": [2 * eighth, 3 * eighth, 3 * eighth],
    }
    config = Qwen2VLConfig(
        text_config=_decoder(shape, layers) | {"rope_parameters": rotary},
        # Attention over all patches of a large image would weigh as much as a decoder layer.
        vision_config={"depth": 0, "embed_dim": 64, "num_heads": 2, "hidden_size": shape.hidden},
        image_token_id=MEDIUM,
        video_token_id=END + 1,
        vision_start_token_id=START,
        vision_end_token_id=END,
    )
    return Qwen2VLForConditionalGeneration(config)


def _audio(shape: Shape, layers: int) -> Any:
    from transformers import Qwen2AudioConfig, Qwen2AudioForConditionalGeneration

    tower = {
        "d_model": 64,
        "encoder_layers": 1,
        "encoder_attention_heads": 1,
        "encoder_ffn_dim": 64,
        "num_mel_bins": MEL_BINS,
        "max_source_positions": 50 * CLIP_SECONDS,
    }
    config = Qwen2AudioConfig(
        audio_config=tower,
        text_config=_decoder(shape, layers) | {"model_type": "qwen2", "pad_token_id": 0},
        audio_token_index=MEDIUM,
    )
    return Qwen2AudioForConditionalGeneration(config)

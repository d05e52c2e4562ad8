"""Small random Qwen2-VL and Qwen2-Audio models with prepared inputs, for tests of their towers."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    Qwen2AudioConfig,
    Qwen2AudioForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)

IMAGE, VIDEO, START, END, AUDIO = 90, 91, 92, 93, 94
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}


def vision_model() -> Qwen2VLForConditionalGeneration:
    """Vision tower: 3 blocks of 40 neurons; merger: 1 layer of 80."""
    torch.manual_seed(3)
    rope = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [2, 1, 1]}
    vision = {
        "depth": 3,
        "embed_dim": 20,
        "num_heads": 5,
        "mlp_ratio": 2,
        "patch_size": 2,
        "temporal_patch_size": 2,
        "spatial_merge_size": 2,
        "hidden_size": TEXT["hidden_size"],
        "initializer_range": 0.2,
    }
    config = Qwen2VLConfig(
        text_config=TEXT | {"rope_parameters": rope},
        vision_config=vision,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=START,
        vision_end_token_id=END,
        tie_word_embeddings=False,
    )
    return Qwen2VLForConditionalGeneration(config).eval()


def vision_inputs() -> dict[str, Any]:
    """Three prompts: two images of different size; text alone; an image and a video."""
    torch.manual_seed(4)
    images = torch.tensor([[1, 4, 4], [1, 2, 6], [1, 2, 2]])
    videos = torch.tensor([[2, 4, 2]])
    parts: list[list[tuple[int, int]]] = [
        [(5, 2), (START, 1), (IMAGE, 4), (END, 1), (START, 1), (IMAGE, 3), (END, 1), (6, 1)],
        [(7, 5)],
        [(START, 1), (IMAGE, 1), (END, 1), (START, 1), (VIDEO, 4), (END, 1), (8, 2)],
    ]
    inputs = padded([[token for token, n in row for _ in range(n)] for row in parts])
    ids = inputs["input_ids"]
    return inputs | {
        "mm_token_type_ids": (ids == IMAGE).int() + 2 * (ids == VIDEO).int(),
        "pixel_values": torch.randn(int(images.prod(1).sum()), 3 * 2 * 2 * 2),
        "image_grid_thw": images,
        "pixel_values_videos": torch.randn(int(videos.prod(1).sum()), 3 * 2 * 2 * 2),
        "video_grid_thw": videos,
    }


def one_image() -> dict[str, Any]:
    """A prompt with one image."""
    torch.manual_seed(4)
    inputs = padded([[5, START, IMAGE, IMAGE, IMAGE, IMAGE, END, 6]])
    return inputs | {
        "mm_token_type_ids": (inputs["input_ids"] == IMAGE).int(),
        "pixel_values": torch.randn(4 * 4, 3 * 2 * 2 * 2),
        "image_grid_thw": torch.tensor([[1, 4, 4]]),
    }


def audio_model() -> Qwen2AudioForConditionalGeneration:
    """Audio tower: 3 layers of 40 neurons, 20 frames."""
    torch.manual_seed(5)
    audio = {
        "d_model": 20,
        "encoder_layers": 3,
        "encoder_attention_heads": 5,
        "encoder_ffn_dim": 40,
        "num_mel_bins": 8,
        "max_source_positions": 20,
        "init_std": 0.2,
        "initializer_range": 0.2,
    }
    config = Qwen2AudioConfig(
        audio_config=audio, text_config=TEXT | {"model_type": "qwen2"}, audio_token_id=AUDIO
    )
    return Qwen2AudioForConditionalGeneration(config).eval()


def audio_inputs() -> dict[str, Any]:
    """Three prompts: clips of 40 and 13 mel frames; text alone; a clip of 22."""
    torch.manual_seed(6)
    lengths = torch.tensor([40, 13, 22])
    # 20, 7 and 11 frames in the tower; 10, 3 and 5 tokens.
    rows = [[5] * 2 + [AUDIO] * 10 + [6] + [AUDIO] * 3 + [7], [8] * 4, [AUDIO] * 5 + [9] * 3]
    return padded(rows) | {
        "input_features": torch.randn(3, 8, 40),
        "feature_attention_mask": (torch.arange(40) < lengths[:, None]).long(),
    }


class Packed(torch.Tensor):
    """Weights in a type of a library's own that says it is of floats, as torchao's does."""

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function in (torch.Tensor.reshape, torch.Tensor.view, torch.Tensor.to):
            raise NotImplementedError(f"{cls.__name__} implements no {function.__name__}")
        return super().__torch_function__(function, types, args, kwargs or {})


def pack(model: Any) -> None:
    """Put a weight of the second layer into such a type."""
    down = model.get_decoder().layers[1].mlp.down_proj
    packed = down.weight.detach().as_subclass(Packed)
    down.weight = torch.nn.Parameter(packed, requires_grad=False)


def padded(rows: list[list[int]]) -> dict[str, Any]:
    """Token ids and mask, padded on the left."""
    longest = max(map(len, rows))
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}

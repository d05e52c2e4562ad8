"""Tiny random models of many families, with prepared inputs.

Every model has two decoder layers of 48 neurons (Gemma 4 has four) and towers of two or three
layers. The inputs are two or three prompts of unequal length, padded on the left, with media in
different samples.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers

from tests import towers
from tests.towers import AUDIO, END, IMAGE, START, TEXT, VIDEO, padded

Inputs = dict[str, Any]
Made = tuple[Any, Inputs]

ROPE = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [2, 1, 1]}
SIDE, PATCH = 8, 4  # pixels
VISION = {
    "hidden_size": 20,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 5,
    "image_size": SIDE,
    "patch_size": PATCH,
    "initializer_range": 0.2,
}
SIGLIP = VISION | {"model_type": "siglip_vision_model", "vision_use_head": False}
CLIP = VISION | {"model_type": "clip_vision_model", "projection_dim": 20}
GRID = {
    "depth": 3,
    "num_heads": 5,
    "patch_size": 2,
    "temporal_patch_size": 2,
    "spatial_merge_size": 2,
    "initializer_range": 0.2,
}
AUDIO_TOWER = {
    "d_model": 20,
    "hidden_size": 20,
    "encoder_layers": 3,
    "num_hidden_layers": 3,
    "encoder_attention_heads": 5,
    "num_attention_heads": 5,
    "encoder_ffn_dim": 40,
    "intermediate_size": 40,
    "num_mel_bins": 8,
    "max_source_positions": 20,
    "init_std": 0.2,
    "initializer_range": 0.2,
}


def text(kind: str = "llama", **options: Any) -> dict[str, Any]:
    return TEXT | {"model_type": kind} | options


def build(name: str, **config: Any) -> Any:
    torch.manual_seed(3)
    kind: Any = getattr(transformers, name)
    model = kind(kind.config_class(**config)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # biases and norms, which are 0 and 1 at first
                parameter.add_(0.1 * torch.randn_like(parameter))
            elif parameter.std() < 0.05:  # whatever scale a family has its weights begin with
                parameter.normal_(0, 0.2)
    return model


def prompts(*items: list[tuple[int, int]]) -> Inputs:
    """Prompts of (token, times)."""
    return padded([[token for token, n in row for _ in range(n)] for row in items])


def pictures(tokens: int, *shape: int) -> Inputs:
    """Two images, text alone, and one image, each of so many tokens."""
    torch.manual_seed(4)
    return prompts(
        [(5, 2), (IMAGE, tokens), (6, 1), (IMAGE, tokens), (7, 1)],
        [(8, 5)],
        [(IMAGE, tokens), (9, 3)],
    ) | {"pixel_values": torch.randn(*(shape or (3, 3, SIDE, SIDE)))}


def llava() -> Made:
    config = {"text_config": text(), "vision_config": CLIP, "image_token_id": IMAGE}
    return build("LlavaForConditionalGeneration", **config), pictures(4)


def llava_next() -> Made:
    config = {"text_config": text(), "vision_config": CLIP, "image_token_id": IMAGE}
    config |= {"image_grid_pinpoints": [[8, 16], [16, 8], [16, 16]]}
    model = build("LlavaNextForConditionalGeneration", **config)
    torch.manual_seed(4)
    # A high image of two tiles and one that fits four, beside the whole image each.
    sizes = torch.tensor([[16, 8], [16, 16]])
    tokens = [4 + 8 + 4, 4 + 16 + 4]
    inputs = prompts([(5, 2), (IMAGE, tokens[0]), (6, 1)], [(8, 5)], [(IMAGE, tokens[1]), (9, 3)])
    pixels = torch.randn(2, 5, 3, SIDE, SIDE)
    pixels[0, 3:] = 0
    return model, inputs | {"pixel_values": pixels, "image_sizes": sizes}


def llava_onevision() -> Made:
    config = {"text_config": text("qwen2"), "vision_config": SIGLIP, "image_token_id": IMAGE}
    config |= {"image_grid_pinpoints": [[8, 16], [16, 8], [16, 16]], "vision_feature_layer": -1}
    config |= {"video_token_id": VIDEO}
    model = build("LlavaOnevisionForConditionalGeneration", **config)
    torch.manual_seed(4)
    sizes = torch.tensor([[16, 8], [16, 16]])
    tokens = [4 + 8 + 4, 4 + 16 + 4]
    frames = 2  # each pooled to one token, and one for the end of the video
    inputs = prompts(
        [(5, 2), (IMAGE, tokens[0]), (6, 1)],
        [(VIDEO, frames + 1), (8, 5)],
        [(IMAGE, tokens[1]), (9, 3)],
    )
    pixels = torch.randn(2, 5, 3, SIDE, SIDE)
    pixels[0, 3:] = 0
    video = torch.randn(1, frames, 3, SIDE, SIDE)
    return model, inputs | {
        "pixel_values": pixels,
        "image_sizes": sizes,
        "pixel_values_videos": video,
    }


def instructblip() -> Made:
    former = {k: v for k, v in VISION.items() if "patch" not in k and k != "image_size"}
    former |= {"hidden_size": 24, "num_attention_heads": 4, "vocab_size": 30}
    model = build(
        "InstructBlipForConditionalGeneration",
        text_config=text(),
        vision_config=VISION,
        qformer_config=former,
        num_query_tokens=4,
        image_token_index=IMAGE,
    )
    torch.manual_seed(4)
    inputs = prompts([(IMAGE, 4), (6, 3)], [(IMAGE, 4), (9, 5)])
    return model, inputs | {
        "pixel_values": torch.randn(2, 3, SIDE, SIDE),
        "qformer_input_ids": torch.tensor([[3, 4, 5], [6, 7, 0]]),
        "qformer_attention_mask": torch.tensor([[1, 1, 1], [1, 1, 0]]),
    }


def qwen2_vl() -> Made:
    return towers.vision_model(), towers.vision_inputs()


def qwen2_5_vl(name: str = "Qwen2_5_VLForConditionalGeneration") -> Made:
    vision = GRID | {"hidden_size": 20, "intermediate_size": 40, "out_hidden_size": 32}
    vision |= {"window_size": 8, "fullatt_block_indexes": [1]}
    return build(name, **grid_config(vision)), towers.vision_inputs()


def qwen3_vl() -> Made:
    vision = GRID | {"hidden_size": 20, "intermediate_size": 40, "out_hidden_size": 32}
    vision |= {"num_position_embeddings": 64, "deepstack_visual_indexes": [0]}
    config = grid_config(vision, text("qwen3_vl_text", head_dim=8, rope_parameters=ROPE))
    return build("Qwen3VLForConditionalGeneration", **config), timestamped(towers.vision_inputs())


def timestamped(inputs: Inputs) -> Inputs:
    """Qwen3-VL's processor puts each frame of a video between delimiters of its own."""
    rows = [
        row[mask.bool()].tolist()
        for row, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)
    ]
    framed = []
    for row in rows:
        new: list[int] = []
        for token in row:
            if token == VIDEO and new.count(VIDEO) == 2:
                new += [END, 11, START]
            new.append(token)
        framed.append(new)
    ids = padded(framed)["input_ids"]
    kinds = (ids == IMAGE).int() + 2 * (ids == VIDEO).int()
    return inputs | padded(framed) | {"mm_token_type_ids": kinds}


def grid_config(vision: dict[str, Any], decoder: dict[str, Any] | None = None) -> dict[str, Any]:
    return {
        "text_config": decoder or TEXT | {"rope_parameters": ROPE},
        "vision_config": vision,
        "image_token_id": IMAGE,
        "video_token_id": VIDEO,
        "vision_start_token_id": START,
        "vision_end_token_id": END,
        "tie_word_embeddings": False,
    }


def gemma3() -> Made:
    model = build(
        "Gemma3ForConditionalGeneration",
        text_config=TEXT
        | {
            "head_dim": 8,
            "sliding_window": 4,
            "layer_types": ["sliding_attention", "full_attention"],
        },
        vision_config=SIGLIP,
        mm_tokens_per_image=4,
        image_token_id=IMAGE,
        boi_token_index=START,
        eoi_token_index=END,
    )
    inputs = pictures(4)
    return model, inputs | {"token_type_ids": (inputs["input_ids"] == IMAGE).long()}


def gemma4() -> Made:
    """Its last two layers take keys and values of earlier ones, and its tower's layers clip."""
    shared = {"num_hidden_layers": 4, "num_kv_shared_layers": 2, "head_dim": 8}
    shared |= {"layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 64}
    embedded = {"vocab_size_per_layer_input": 100, "hidden_size_per_layer_input": 8}
    model = build(
        "Gemma4ForConditionalGeneration",
        text_config=TEXT | shared | embedded | {"global_head_dim": 8},
        vision_config={
            "hidden_size": 24,
            "intermediate_size": 40,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "head_dim": 8,
            "pooling_kernel_size": 2,
            "patch_size": 2,
            "position_embedding_size": 64,
            "use_clipped_linears": True,
            "initializer_range": 0.2,
        },
        audio_config=None,
        image_token_id=IMAGE,
        video_token_id=None,
        audio_token_id=None,
        boi_token_id=START,
        eoi_token_id=END,
    )
    rows, columns = torch.meshgrid(torch.arange(4), torch.arange(4), indexing="ij")
    places = torch.stack([columns, rows], -1).reshape(1, 16, 2).repeat(3, 1, 1)
    inputs = pictures(4, 3, 16, 12)  # patches of 2 x 2 pixels, four of which are a token
    kinds = (inputs["input_ids"] == IMAGE).long()
    return model, inputs | {"image_position_ids": places, "mm_token_type_ids": kinds}


def paligemma() -> Made:
    model = build(
        "PaliGemmaForConditionalGeneration",
        text_config=text("gemma", head_dim=8),
        vision_config=SIGLIP | {"projection_dim": 32},
        image_token_id=IMAGE,
        projection_dim=32,
        hidden_size=32,
    )
    inputs = pictures(4)
    return model, inputs | {"token_type_ids": torch.zeros_like(inputs["input_ids"])}


def internvl() -> Made:
    vision = VISION | {"image_size": [SIDE, SIDE], "patch_size": [PATCH, PATCH]}
    model = build(
        "InternVLForConditionalGeneration",
        text_config=text("qwen2"),
        vision_config=vision,
        image_token_id=IMAGE,
        downsample_ratio=0.5,
    )
    return model, pictures(1)


def smolvlm() -> Made:
    model = build(
        "SmolVLMForConditionalGeneration",
        text_config=text(),
        vision_config=VISION,
        image_token_id=IMAGE,
        scale_factor=2,
    )
    inputs = pictures(1, 3, 2, 3, SIDE, SIDE)
    inputs["pixel_values"][1] = 0  # the sample without images
    inputs["pixel_values"][2, 1] = 0
    mask = torch.ones(3, 2, SIDE, SIDE, dtype=torch.long)
    mask[0, 1, :, PATCH:] = 0  # half of an image is padding
    return model, inputs | {"pixel_attention_mask": mask}


def mistral3() -> Made:
    vision = VISION | {"model_type": "pixtral", "image_size": 16, "head_dim": 4}
    model = build(
        "Mistral3ForConditionalGeneration",
        text_config=text("mistral", head_dim=8),
        vision_config=vision,
        image_token_id=IMAGE,
        spatial_merge_size=2,
        vision_feature_layer=-1,
    )
    torch.manual_seed(4)
    inputs = prompts([(5, 2), (IMAGE, 2), (6, 1), (IMAGE, 1)], [(8, 5)], [(IMAGE, 4), (9, 3)])
    return model, inputs | {
        "pixel_values": torch.randn(3, 3, 16, 16),
        "image_sizes": torch.tensor([[16, 8], [8, 8], [16, 16]]),
    }


def voxtral() -> Made:
    model = build(
        "VoxtralForConditionalGeneration",
        text_config=text(),
        audio_config=AUDIO_TOWER | {"encoder_ffn_dim": 80, "intermediate_size": 80},
        audio_token_id=AUDIO,
    )
    torch.manual_seed(6)
    # Four frames of the tower are one token, as its MLPs are four times as wide as it is.
    inputs = prompts([(5, 2), (AUDIO, 10), (6, 1)], [(8, 4)], [(AUDIO, 5), (9, 3)])
    return model, inputs | {"input_features": torch.randn(3, 8, 40)}


def qwen2_audio() -> Made:
    return towers.audio_model(), towers.audio_inputs()


def qwen2_5_omni() -> Made:
    vision = GRID | {"hidden_size": 20, "intermediate_size": 40, "out_hidden_size": 32}
    vision |= {"window_size": 8, "fullatt_block_indexes": [1]}
    audio = AUDIO_TOWER | {"n_window": 10, "output_dim": 32}
    model = build(
        "Qwen2_5OmniThinkerForConditionalGeneration",
        text_config=TEXT | {"rope_parameters": ROPE},
        vision_config=vision,
        audio_config=audio,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        audio_token_id=AUDIO,
        audio_start_token_id=95,
        audio_end_token_id=96,
        vision_start_token_id=START,
        vision_end_token_id=END,
    )
    torch.manual_seed(6)
    grid = torch.tensor([[1, 4, 4], [1, 2, 6]])
    lengths = torch.tensor([40, 13])
    inputs = prompts(
        [(START, 1), (IMAGE, 4), (END, 1), (95, 1), (AUDIO, 10), (96, 1), (6, 1)],
        [(8, 5)],
        [(95, 1), (AUDIO, 3), (96, 1), (START, 1), (IMAGE, 3), (END, 1), (9, 2)],
    )
    return model, inputs | {
        "pixel_values": torch.randn(int(grid.prod(1).sum()), 3 * 2 * 2 * 2),
        "image_grid_thw": grid,
        "input_features": torch.randn(2, 8, 40),
        "feature_attention_mask": (torch.arange(40) < lengths[:, None]).long(),
    }


def phi4_multimodal() -> Made:
    """Gate and up of its MLPs are one projection, and its encoders are part of its decoder."""
    vision = VISION | {"image_size": SIDE, "crop_size": SIDE, "patch_size": 2}
    audio = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_blocks": 1,
        "num_attention_heads": 2,
        "ext_pw_out_channel": 16,
        "depthwise_separable_out_channel": 16,
        "input_size": 16,
        "nemo_conv_channels": 16,
        "audio_token_id": AUDIO,
    }
    model = build(
        "Phi4MultimodalForCausalLM",
        **TEXT,
        original_max_position_embeddings=64,
        max_position_embeddings=64,
        vision_config=vision | {"image_token_id": IMAGE},
        audio_config=audio,
    )
    torch.manual_seed(4)
    # Two crops of 2 x 2 tokens side by side and the whole image, with a token after each row.
    tokens = 2 * 5 + 1 + 2 * 3
    inputs = prompts([(5, 2), (IMAGE, tokens), (6, 1)], [(IMAGE, tokens), (9, 5)])
    return model, inputs | {
        "image_pixel_values": torch.randn(2, 3, 3, SIDE, SIDE),
        "image_sizes": torch.tensor([[SIDE, 2 * SIDE]] * 2),
        "image_attention_mask": torch.ones(2, 3, 4, 4),
    }


def llama() -> Made:
    return build("LlamaForCausalLM", **TEXT), prompts([(5, 3), (6, 2)], [(7, 2), (8, 1)])

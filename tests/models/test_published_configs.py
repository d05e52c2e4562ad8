"""What is read off models of published size, without weights, against published numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import transformers

from miner_lens.models.experts import ExpertProjection
from miner_lens.models.modality import delimiters, media_tokens
from miner_lens.models.sites import sites

QWEN = {"num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064}
QWEN |= {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28}
MROPE = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
QWEN_TOKENS = {
    "image_token_id": 151655,
    "video_token_id": 151656,
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
}
QWEN_VISION = {"depth": 32, "num_heads": 16, "patch_size": 14, "spatial_merge_size": 2}
QWEN_VISION |= {"temporal_patch_size": 2}
QWEN2_5_VISION = QWEN_VISION | {
    "hidden_size": 1280,
    "intermediate_size": 3420,
    "out_hidden_size": 3584,
    "window_size": 112,
    "fullatt_block_indexes": [7, 15, 23, 31],
}
WHISPER = {"d_model": 1280, "encoder_layers": 32, "encoder_attention_heads": 20}
WHISPER |= {"encoder_ffn_dim": 5120, "num_mel_bins": 128, "max_source_positions": 1500}
SIGLIP = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27}
SIGLIP |= {"num_attention_heads": 16, "patch_size": 14, "vision_use_head": False}
SIGLIP |= {"model_type": "siglip_vision_model"}


@dataclass(frozen=True)
class Published:
    """A published model.

    Attributes:
        architecture: Its class in transformers.
        config: What of its config says how large it is.
        sites: Layers and neurons of each site.
        media: The placeholder token of each medium.
        around: Tokens around media.
        experts: In a layer of the decoder.
    """

    architecture: str
    config: dict[str, Any]
    sites: dict[str, tuple[int, int]]
    media: dict[str, int]
    around: tuple[int, ...] = ()
    experts: int | None = None


PUBLISHED = {
    # config.json of Qwen/Qwen2-VL-7B-Instruct.
    "Qwen2-VL-7B": Published(
        "Qwen2VLForConditionalGeneration",
        QWEN_TOKENS
        | {
            "text_config": QWEN | {"rope_parameters": MROPE},
            "vision_config": QWEN_VISION
            | {"embed_dim": 1280, "hidden_size": 3584, "mlp_ratio": 4, "model_type": "qwen2_vl"},
        },
        {"llm": (28, 18944), "vision": (32, 5120), "projector": (1, 5120)},
        {"image": 151655, "video": 151656},
        (151652, 151653),
    ),
    # kohya-ss/musubi-tuner, src/musubi_tuner/qwen_image/qwen_image_utils.py.
    "Qwen2.5-VL-7B": Published(
        "Qwen2_5_VLForConditionalGeneration",
        QWEN_TOKENS
        | {
            "text_config": QWEN | {"rope_parameters": MROPE},
            "vision_config": QWEN2_5_VISION,
        },
        {"llm": (28, 18944), "vision": (32, 3420), "projector": (1, 5120)},
        {"image": 151655, "video": 151656},
        (151652, 151653),
    ),
    # kohya-ss/musubi-tuner, src/musubi_tuner/krea2/krea2_encoder.py. Three mergers of DeepStack.
    "Qwen3-VL-4B": Published(
        "Qwen3VLForConditionalGeneration",
        QWEN_TOKENS
        | {
            "text_config": {
                "head_dim": 128,
                "hidden_size": 2560,
                "intermediate_size": 9728,
                "num_attention_heads": 32,
                "num_hidden_layers": 36,
                "num_key_value_heads": 8,
                "rope_parameters": MROPE | {"rope_theta": 5e6, "mrope_section": [24, 20, 20]},
                "vocab_size": 151936,
            },
            "vision_config": {
                "deepstack_visual_indexes": [5, 11, 17],
                "depth": 24,
                "hidden_size": 1024,
                "intermediate_size": 4096,
                "num_heads": 16,
                "num_position_embeddings": 2304,
                "out_hidden_size": 2560,
                "patch_size": 16,
                "spatial_merge_size": 2,
                "temporal_patch_size": 2,
            },
        },
        {"llm": (36, 9728), "vision": (24, 4096), "projector": (4, 4096)},
        {"image": 151655, "video": 151656},
        (151652, 151653),
    ),
    # config.json of Qwen/Qwen3-VL-30B-A3B-Instruct, and huggingface/transformers,
    # configuration_qwen3_vl_moe.py, for its tower.
    "Qwen3-VL-30B-A3B": Published(
        "Qwen3VLMoeForConditionalGeneration",
        QWEN_TOKENS
        | {
            "text_config": {
                "head_dim": 128,
                "hidden_size": 2048,
                "moe_intermediate_size": 768,
                "num_attention_heads": 32,
                "num_experts": 128,
                "num_experts_per_tok": 8,
                "num_hidden_layers": 48,
                "num_key_value_heads": 4,
                "rope_parameters": MROPE | {"rope_theta": 5e6, "mrope_section": [24, 20, 20]},
                "vocab_size": 151936,
            },
            "vision_config": {
                "deepstack_visual_indexes": [8, 16, 24],
                "depth": 27,
                "hidden_size": 1152,
                "intermediate_size": 4304,
                "num_heads": 16,
                "num_position_embeddings": 2304,
                "out_hidden_size": 2048,
                "patch_size": 16,
                "spatial_merge_size": 2,
                "temporal_patch_size": 2,
            },
        },
        {"llm": (48, 128 * 768), "vision": (27, 4304), "projector": (4, 4608)},
        {"image": 151655, "video": 151656},
        (151652, 151653),
        experts=128,
    ),
    # huggingface/transformers, configuration_llava.py, and LlamaConfig, which is Llama 7B.
    "LLaVA-1.5-7B": Published(
        "LlavaForConditionalGeneration",
        {
            "image_token_index": 32000,
            "text_config": {
                "model_type": "llama",
                "hidden_size": 4096,
                "intermediate_size": 11008,
                "num_attention_heads": 32,
                "num_hidden_layers": 32,
                "vocab_size": 32064,
            },
            "vision_config": {
                "model_type": "clip_vision_model",
                "hidden_size": 1024,
                "image_size": 336,
                "intermediate_size": 4096,
                "num_attention_heads": 16,
                "num_hidden_layers": 24,
                "patch_size": 14,
                "projection_dim": 768,
            },
        },
        {"llm": (32, 11008), "vision": (24, 4096), "projector": (1, 4096)},
        {"image": 32000},
    ),
    # huggingface/transformers, src/transformers/models/gemma3/convert_gemma3_weights.py.
    "Gemma-3-4B": Published(
        "Gemma3ForConditionalGeneration",
        {
            "boi_token_index": 255999,
            "eoi_token_index": 256000,
            "image_token_index": 262144,
            "mm_tokens_per_image": 256,
            "text_config": {
                "head_dim": 256,
                "hidden_size": 2560,
                "intermediate_size": 10240,
                "num_attention_heads": 8,
                "num_hidden_layers": 34,
                "num_key_value_heads": 4,
                "sliding_window": 1024,
            },
            "vision_config": SIGLIP | {"image_size": 896},
        },
        {"llm": (34, 10240), "vision": (27, 4304)},
        {"image": 262144},
        (255999, 256000),
    ),
    # huggingface/lerobot, get_paligemma_config of its pi0 conversion; google/paligemma-3b-pt-224.
    "PaliGemma-3B": Published(
        "PaliGemmaForConditionalGeneration",
        {
            "image_token_index": 257152,
            "text_config": {
                "model_type": "gemma",
                "head_dim": 256,
                "hidden_size": 2048,
                "intermediate_size": 16384,
                "num_attention_heads": 8,
                "num_hidden_layers": 18,
                "num_key_value_heads": 1,
                "vocab_size": 257152,
            },
            "vision_config": SIGLIP | {"image_size": 224, "projection_dim": 2048},
        },
        {"llm": (18, 16384), "vision": (27, 4304)},
        {"image": 257152},
    ),
    # huggingface/transformers, configuration_internvl.py and convert_internvl_weights_to_hf.py; its
    # decoder is Qwen2.5-0.5B.
    "InternVL3-1B": Published(
        "InternVLForConditionalGeneration",
        {
            "image_token_id": 151667,
            "downsample_ratio": 0.5,
            "text_config": {
                "model_type": "qwen2",
                "hidden_size": 896,
                "intermediate_size": 4864,
                "num_attention_heads": 14,
                "num_hidden_layers": 24,
                "num_key_value_heads": 2,
                "vocab_size": 151674,
            },
            "vision_config": {
                "hidden_size": 1024,
                "image_size": [448, 448],
                "intermediate_size": 4096,
                "num_attention_heads": 16,
                "num_hidden_layers": 24,
                "patch_size": [14, 14],
            },
        },
        {"llm": (24, 4864), "vision": (24, 4096), "projector": (1, 896)},
        {"image": 151667},
    ),
    # config.json of HuggingFaceTB/SmolVLM2-500M-Video-Instruct, and huggingface/transformers,
    # configuration_smolvlm.py, for what that leaves out.
    "SmolVLM2-500M": Published(
        "SmolVLMForConditionalGeneration",
        {
            "image_token_id": 49190,
            "scale_factor": 4,
            "text_config": {
                "model_type": "llama",
                "head_dim": 64,
                "hidden_size": 960,
                "intermediate_size": 2560,
                "num_attention_heads": 15,
                "num_hidden_layers": 32,
                "num_key_value_heads": 5,
                "vocab_size": 49280,
            },
            "vision_config": {
                "hidden_size": 768,
                "image_size": 512,
                "intermediate_size": 3072,
                "num_attention_heads": 12,
                "num_hidden_layers": 12,
                "patch_size": 16,
            },
        },
        {"llm": (32, 2560), "vision": (12, 3072)},
        {"image": 49190},
    ),
    # huggingface/transformers, configuration_mistral3.py, for
    # mistralai/Mistral-Small-3.1-24B-Instruct-2503.
    "Mistral-Small-3.1-24B": Published(
        "Mistral3ForConditionalGeneration",
        {
            "image_token_index": 10,
            "spatial_merge_size": 2,
            "vision_feature_layer": -1,
            "text_config": {
                "model_type": "mistral",
                "head_dim": 128,
                "hidden_size": 5120,
                "intermediate_size": 32768,
                "num_attention_heads": 32,
                "num_hidden_layers": 40,
                "num_key_value_heads": 8,
                "vocab_size": 131072,
            },
            "vision_config": {
                "model_type": "pixtral",
                "head_dim": 64,
                "hidden_size": 1024,
                "image_size": 1540,
                "intermediate_size": 4096,
                "num_attention_heads": 16,
                "num_hidden_layers": 24,
                "patch_size": 14,
            },
        },
        {"llm": (40, 32768), "vision": (24, 4096), "projector": (1, 5120)},
        {"image": 10},
    ),
    # huggingface/transformers, configuration_voxtral.py, for mistralai/Voxtral-Mini-3B-2507.
    "Voxtral-Mini-3B": Published(
        "VoxtralForConditionalGeneration",
        {
            "audio_token_id": 24,
            "audio_config": {
                "hidden_size": 1280,
                "intermediate_size": 5120,
                "max_source_positions": 1500,
                "num_attention_heads": 20,
                "num_hidden_layers": 32,
                "num_mel_bins": 128,
            },
            "text_config": {
                "model_type": "llama",
                "head_dim": 128,
                "hidden_size": 3072,
                "intermediate_size": 8192,
                "num_attention_heads": 32,
                "num_hidden_layers": 30,
                "num_key_value_heads": 8,
                "vocab_size": 131072,
            },
        },
        {"llm": (30, 8192), "audio": (32, 5120), "projector": (1, 3072)},
        {"audio": 24},
    ),
    # huggingface/transformers, configuration_qwen2_audio.py; its decoder is Qwen-7B.
    "Qwen2-Audio-7B": Published(
        "Qwen2AudioForConditionalGeneration",
        {
            "audio_token_index": 151646,
            "audio_config": WHISPER,
            "text_config": {
                "model_type": "qwen2",
                "hidden_size": 4096,
                "intermediate_size": 11008,
                "num_attention_heads": 32,
                "num_hidden_layers": 32,
                "vocab_size": 156032,
            },
        },
        {"llm": (32, 11008), "audio": (32, 5120)},
        {"audio": 151646},
    ),
    # huggingface/transformers, configuration_qwen2_5_omni.py.
    "Qwen2.5-Omni-7B": Published(
        "Qwen2_5OmniThinkerForConditionalGeneration",
        {
            "audio_token_index": 151646,
            "image_token_index": 151655,
            "video_token_index": 151656,
            "audio_start_token_id": 151647,
            "audio_end_token_id": 151648,
            "audio_config": WHISPER | {"n_window": 100, "output_dim": 3584},
            "text_config": QWEN | {"rope_parameters": MROPE},
            "vision_config": QWEN2_5_VISION,
        },
        {
            "llm": (28, 18944),
            "audio": (32, 5120),
            "vision": (32, 3420),
            "projector": (1, 5120),
        },
        {"image": 151655, "video": 151656, "audio": 151646},
        (151647, 151648),
    ),
    # huggingface/transformers, configuration_phi4_multimodal.py.
    "Phi-4-multimodal": Published(
        "Phi4MultimodalForCausalLM",
        {
            "hidden_size": 3072,
            "intermediate_size": 8192,
            "num_attention_heads": 24,
            "num_hidden_layers": 32,
            "num_key_value_heads": 8,
            "vision_config": {"image_token_id": 200010},
            "audio_config": {"audio_token_id": 200011},
        },
        {"llm": (32, 8192)},
        {"image": 200010, "audio": 200011},
    ),
}


def test_every_model_is_read_as_published() -> None:
    """In one test, as building all of them takes seconds."""
    assert {name: found(one) for name, one in PUBLISHED.items()} == {
        name: (one.sites, one.media, one.experts) for name, one in PUBLISHED.items()
    }


def found(published: Published) -> Any:
    kind: Any = getattr(transformers, published.architecture)
    config = kind.config_class(**published.config)
    with torch.device("meta"):
        model = kind(config)
    mlps = {name: site.mlps(model) for name, site in sites(model).items()}
    sizes = {name: (len(all_), all_[0].down.in_features) for name, all_ in mlps.items()}
    assert set(published.around) <= delimiters(config)
    down = mlps["llm"][0].down
    experts = down.count if isinstance(down, ExpertProjection) else None
    return sizes, media_tokens(config), experts

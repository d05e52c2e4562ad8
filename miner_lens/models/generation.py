"""Conversations: what a model reads, and what it answers."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from miner_lens.data.media import load_media
from miner_lens.data.sample import Message, SampleError
from miner_lens.models.collate import Inputs as Inputs
from miner_lens.models.collate import collate
from miner_lens.models.inside import bare, hf_model_of, is_bridge, processor_of
from miner_lens.models.mistral import is_mistral, with_sound_files
from miner_lens.models.rendering import (
    REFUSALS,
    fit_template,
    media_of,
    opening,
    placeholders,
    require_media,
    require_parts,
    require_texts,
)

# What in a generation config leaves greedy decoding the choice of the most probable token.
_HARMLESS = {
    "_from_model_config",
    "bos_token_id",
    "cache_implementation",
    "decoder_start_token_id",
    "do_sample",
    "eos_token_id",
    "max_length",
    "max_new_tokens",
    "min_p",
    "pad_token_id",
    "temperature",
    "top_k",
    "top_p",
    "transformers_version",
    "typical_p",
    "use_cache",
}

# `run` renders in a thread of its own; neither tokenizers nor half-opened images can be shared.
_rendering = threading.Lock()


def prepare_inputs(
    model: Any, conversations: Sequence[Sequence[Message]], add_generation_prompt: bool = True
) -> Inputs:
    """Render conversations with the model's processor, on the model's device, left-padded.

    Raises:
        ValueError: The model has no processor.
        SampleError: A medium cannot be read, or the processor refuses the conversation.
    """
    return to_device(render(model, conversations, add_generation_prompt), input_device(model))


def render(
    model: Any,
    conversations: Sequence[Sequence[Message]],
    add_generation_prompt: bool | None = None,
) -> Inputs:
    """Return what `prepare_inputs` does, still on the CPU.

    By default prompts end with the opening of the assistant's turn where all conversations await an
    answer, and as the conversations do where all end with a turn of the assistant. This is what is
    mined, with an answer behind it and without.
    """
    if add_generation_prompt is None:
        (add_generation_prompt,) = {awaits_answer(messages) for messages in conversations}
    processor = processor_of(model)
    if processor is None:
        raise ValueError(
            "This model has no processor, so it cannot read messages. Set model.processor "
            "(ml.load does), or pass prepared model inputs."
        )
    media = media_of(model)
    with _rendering:
        opened = [load_media(messages, processor) for messages in conversations]
        spelled = placeholders(processor, media or {})
        for messages, read in zip(conversations, opened, strict=True):
            require_parts(messages, read, spelled)
        try:
            batch = _encode(processor, opened, add_generation_prompt)
        except SampleError:
            raise
        except REFUSALS as error:
            raise SampleError(f"The processor cannot read this conversation: {error}") from error
    # PaliGemma's processor adds labels, for training.
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    require_media(opened, inputs, media)
    return inputs


def _encode(processor: Any, opened: Sequence[Any], add_generation_prompt: bool) -> Any:
    """Model inputs of conversations, of whose texts and media a chat template leaves none out."""
    tokenizer = getattr(processor, "tokenizer", processor)
    mistral = is_mistral(tokenizer)
    if mistral:  # without a chat template to ask
        opened = with_sound_files(opened, processor.feature_extractor.sampling_rate)
    else:
        template = partial(
            processor.apply_chat_template,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
        )
        source = str(processor.chat_template)
        opened = [fit_template(template, messages, source) for messages in opened]
    if tokenizer is processor:
        return _as_text(processor, opened, add_generation_prompt)
    batch = processor.apply_chat_template(
        opened,
        tokenize=True,
        add_generation_prompt=add_generation_prompt,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True, "padding_side": "left", **_videos(opened)},
    )
    if mistral:
        for messages, ids in zip(opened, batch["input_ids"], strict=True):
            require_texts(messages, tokenizer.decode(ids))
    return batch


def _videos(opened: Sequence[Sequence[Message]]) -> dict[str, Any]:
    """What a processor is told of videos, whose frames `load_media` has sampled."""
    contents = [message["content"] for messages in opened for message in messages]
    parts = [part for content in contents if not isinstance(content, str) for part in content]
    known = [part.pop("metadata") for part in parts if part["type"] == "video"]
    return {"video_metadata": known, "do_sample_frames": False} if known else {}


def _as_text(tokenizer: Any, opened: Sequence[Any], add_generation_prompt: bool) -> Inputs:
    """What a model without media reads, one conversation at a time, as padding is of ours."""
    apart = [
        dict(
            tokenizer.apply_chat_template(
                messages,
                tokenize=True,
                add_generation_prompt=add_generation_prompt,
                return_dict=True,
                return_tensors="pt",
            )
        )
        for messages in opened
    ]
    # Padding is masked, so any token will do where a tokenizer has none to pad with.
    return collate(apart, tokenizer.pad_token_id or 0)


def awaits_answer(messages: Sequence[Message]) -> bool:
    """Return True if it is the assistant's turn, so that the prompt ends with its opening."""
    last = messages[-1] if messages else None
    return not (isinstance(last, Mapping) and last.get("role") == "assistant")


def answer_opening(model: Any, messages: Sequence[Message]) -> str:
    """Return the text between a conversation, rendered as it awaits an answer, and the answer.

    A conversation that ends with a turn of the assistant is read as it is, and an answer to it is a
    further turn.

    Raises:
        SampleError: The model's chat template opens no further turn.
    """
    processor = processor_of(model)
    if awaits_answer(messages):
        return ""
    if is_mistral(getattr(processor, "tokenizer", processor)):
        raise SampleError(
            "The conversation ends with a turn of the assistant, and Mistral's tokenizers open no "
            "further one for an answer. Leave the last turn out of the messages."
        )
    return opening(partial(processor.apply_chat_template, tokenize=False), messages)


def input_device(model: Any) -> torch.device:
    """Where the model takes its inputs."""
    hf_model = hf_model_of(model)
    device: torch.device = hf_model.device
    if device.type != "meta":
        return device
    # The embeddings are offloaded; accelerate brings them, and then its hook says where to.
    hook = getattr(hf_model.get_input_embeddings(), "_hf_hook", None)
    return torch.device(getattr(hook, "execution_device", None) or "cpu")


def to_device(inputs: Inputs, device: torch.device) -> Inputs:
    """Move the tensors among some model inputs."""
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in inputs.items()}


def inputs(model: Any, messages: Sequence[Message], add_generation_prompt: bool = True) -> Inputs:
    """Turn messages into what `model(**inputs)` and `model.run_with_cache(**inputs)` take.

    Args:
        model: A bridge with a processor, or a Hugging Face model with a `.processor`.
        messages: One conversation in Hugging Face chat format.
        add_generation_prompt: Whether to end with the opening of the assistant's turn.

    Returns:
        Keyword arguments on the model's device. The token ids are called `input` for a bridge,
        as TransformerLens calls them, and `input_ids` for a Hugging Face model.
    """
    batch = prepare_inputs(model, [messages], add_generation_prompt)
    if is_bridge(bare(model)):
        batch = {"input": batch.pop("input_ids"), **batch}
    return batch


def generate(
    model: Any,
    messages: Sequence[Message] | Sequence[Sequence[Message]],
    max_new_tokens: int = 128,
    **options: Any,
) -> str | list[str]:
    """Answer a conversation, or a batch of them, with all hooks and ablations live.

    Greedy unless `options` say otherwise, and then token for token what plain Hugging Face
    generation gives. (`TransformerBridge.generate` cannot be used: it feeds the pixels again at
    each step.) Where TransformerLens rebuilds attention no cache can be used, which takes longer.

    Args:
        model: A bridge with a processor.
        messages: One conversation in Hugging Face chat format, or a list of conversations.
        max_new_tokens: How many tokens to generate at most.
        options: Passed on to Hugging Face's `generate`.

    Returns:
        The answer, or one answer for each conversation.
    """
    if not messages:
        raise ValueError("There is no message to answer.")
    single = isinstance(messages[0], dict)
    conversations: Any = [messages] if single else messages
    batch = prepare_inputs(model, conversations)
    answers = generate_from(model, batch, max_new_tokens, **options)
    return answers[0] if single else answers


def generate_from(
    model: Any, batch: Inputs, max_new_tokens: int = 128, **options: Any
) -> list[str]:
    """Answer conversations that `prepare_inputs` has rendered; see `generate`."""
    options = {"do_sample": False, "max_new_tokens": max_new_tokens} | options
    with torch.no_grad():
        tokens = hf_model_of(model).generate(**batch, **options)
    new = tokens[:, batch["input_ids"].shape[1] :]
    answers: list[str] = processor_of(model).batch_decode(new, skip_special_tokens=True)
    return answers


def is_greedy(model: Any) -> bool:
    """Whether greedy generation takes the most probable token at each step, and nothing else does.

    A penalty on repetition, say, or several beams in the model's generation config change that.
    """
    config = getattr(hf_model_of(model), "generation_config", None)
    return config is None or config.to_diff_dict().keys() <= _HARMLESS

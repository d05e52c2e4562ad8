"""Conversations: what a model reads, and what it answers."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from miner_lens.data.media import load_media
from miner_lens.data.sample import Message, SampleError
from miner_lens.models.bridge_methods import require_count
from miner_lens.models.collate import MASK, brings_media, collate, masked
from miner_lens.models.collate import Inputs as Inputs
from miner_lens.models.inside import bare, hf_model_of, is_bridge, processor_of
from miner_lens.models.mistral import is_mistral
from miner_lens.models.processing import read
from miner_lens.models.rendering import (
    REFUSALS,
    fit_template,
    media_of,
    opening,
    placeholders,
    require_media,
    require_parts,
    require_texts,
    spelled_out,
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

TOO_MANY = (
    "{search} finds fewer answers than num_return_sequences={count}. Pass do_sample=True here to "
    "sample them (with num_beams=1), or num_beams={count} or more for the best of a beam search."
)

MIXED_UP = (
    "Beam search in transformers gives the copies of a conversation the media of others here, as "
    "this model takes media one by one. Ask without beams (do_sample=True), or about one medium in "
    "each conversation."
)

# `run` renders in a thread of its own; neither tokenizers nor half-opened images can be shared.
_rendering = threading.Lock()


def prepare_inputs(
    model: Any,
    conversations: Sequence[Sequence[Message]],
    add_generation_prompt: bool = True,
    **processor_kwargs: Any,
) -> Inputs:
    """Render conversations with the model's processor, on the model's device, left-padded.

    Raises:
        ValueError: The model has no processor.
        SampleError: A medium cannot be read, or the processor refuses the conversation.
    """
    rendered = render(model, conversations, add_generation_prompt, **processor_kwargs)
    return to_device(rendered, input_device(model))


def render(
    model: Any,
    conversations: Sequence[Sequence[Message]],
    add_generation_prompt: bool | None = None,
    **processor_kwargs: Any,
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
        hf_model_of(model)  # or it is no model at all
        raise ValueError(
            "This model has no processor, so it cannot read messages. Set model.processor "
            "(ml.load does), or pass prepared model inputs."
        )
    media = media_of(model)
    with _rendering:
        opened = [load_media(m, processor, **processor_kwargs) for m in conversations]
        for messages, parts in zip(conversations, opened, strict=True):
            require_parts(messages, parts)
        marks = placeholders(processor, media or {})
        spelled = next(filter(None, (spelled_out(messages, marks) for messages in opened)), "")
        try:
            inputs = _encode(processor, opened, add_generation_prompt, processor_kwargs, marks)
        except SampleError:
            raise
        except REFUSALS as error:
            raise SampleError(
                f"The processor cannot read this conversation: {error} {spelled}".strip()
            ) from error
        if spelled:
            raise SampleError(spelled)
    require_media(opened, inputs, media)
    return inputs


def _encode(
    processor: Any,
    opened: Sequence[Any],
    add_generation_prompt: bool,
    processor_kwargs: Mapping[str, Any],
    placeholders: Collection[str],
) -> Inputs:
    """Return model inputs of conversations, of whose texts and media a template leaves none out."""
    tokenizer = getattr(processor, "tokenizer", processor)
    mistral = is_mistral(tokenizer)
    if not mistral:  # which has no chat template to ask
        template = partial(
            processor.apply_chat_template,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
        )
        source = str(processor.chat_template)
        opened = [fit_template(template, messages, source, placeholders) for messages in opened]
    if tokenizer is processor:
        return _as_text(processor, opened, add_generation_prompt, processor_kwargs)
    # Where padding would not be told from tokens, it is of ours.
    tells = MASK in tokenizer.model_input_names
    batches = [opened] if tells else [[messages] for messages in opened]
    apart = [read(processor, one, add_generation_prompt, processor_kwargs) for one in batches]
    inputs = masked(apart[0]) if len(apart) == 1 else collate(apart, tokenizer.pad_token_id or 0)
    if mistral:
        for messages, ids in zip(opened, inputs["input_ids"], strict=True):
            require_texts(messages, tokenizer.decode(ids))
    return inputs


def _as_text(
    tokenizer: Any,
    opened: Sequence[Any],
    add_generation_prompt: bool,
    tokenizer_kwargs: Mapping[str, Any],
) -> Inputs:
    """What a model without media reads, one conversation at a time, as padding is of ours."""
    takes = inspect.signature(tokenizer.apply_chat_template).parameters
    for name in tokenizer_kwargs:
        # What it does not take by name, it hands to the template, which may not read it.
        if name not in takes and name not in str(tokenizer.chat_template):
            raise TypeError(f"{type(tokenizer).__name__} has no option {name!r}")
    apart = [
        dict(
            tokenizer.apply_chat_template(
                messages,
                tokenize=True,
                add_generation_prompt=add_generation_prompt,
                return_dict=True,
                return_tensors="pt",
                **tokenizer_kwargs,
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


def inputs(
    model: Any,
    messages: Sequence[Message] | Sequence[Sequence[Message]],
    add_generation_prompt: bool = True,
    **processor_kwargs: Any,
) -> Inputs:
    """Turn messages into what `model(**inputs)` and `model.run_with_cache(**inputs)` take.

    Args:
        model: A bridge with a processor, or a Hugging Face model with a `.processor`.
        messages: One conversation in Hugging Face chat format, or a list of conversations, which
            become a batch with padding on the left.
        add_generation_prompt: Whether to end with the opening of the assistant's turn.
        processor_kwargs: Passed on to the processor, such as `max_pixels` or `num_frames`, by
            name or as `images_kwargs`, `videos_kwargs`, `audio_kwargs` and `text_kwargs`.

    Returns:
        Keyword arguments on the model's device. The token ids are called `input` for a bridge,
        as TransformerLens calls them, and `input_ids` for a Hugging Face model.

    Raises:
        ValueError: The messages are no conversation, or the model has no processor.
        SampleError: A medium cannot be read, or the processor refuses a conversation.
    """
    _, conversations = _conversations(messages)
    batch = prepare_inputs(model, conversations, add_generation_prompt, **processor_kwargs)
    if is_bridge(bare(model)):
        batch = {"input": batch.pop("input_ids"), **batch}
    return batch


def generate(
    model: Any,
    messages: Sequence[Message] | Sequence[Sequence[Message]],
    max_new_tokens: int = 128,
    processor_kwargs: Mapping[str, Any] | None = None,
    **options: Any,
) -> str | list[str] | list[list[str]]:
    """Answer a conversation, or a batch of them, with all hooks and ablations live.

    Greedy unless `options` say otherwise, and token for token what plain Hugging Face generation
    gives. TransformerLens's `model.generate(**ml.inputs(model, messages))` takes its own options,
    samples unless told otherwise, and returns tokens, prompt included; greedy, they are the same.

    Args:
        model: A bridge with a processor.
        messages: One conversation in Hugging Face chat format, or a list of conversations.
        max_new_tokens: How many tokens to generate at most.
        processor_kwargs: Passed on to the processor, as `apply_chat_template` takes them.
        options: Passed on to Hugging Face's `generate`.

    Returns:
        The answer, or one answer for each conversation. Where there are several to each
        (`num_return_sequences`, with `do_sample=True` or as many beams), a list of them in the
        place of each answer.

    Raises:
        ValueError: The messages are no conversation, or the number of answers is below 1 or more
            than the search finds.
        SampleError: A medium cannot be read, or the processor refuses a conversation.
    """
    single, conversations = _conversations(messages)
    config = options.get("generation_config") or hf_model_of(model).generation_config
    count = options.setdefault("num_return_sequences", config.num_return_sequences or 1)
    require_count(count)
    beams = options.get("num_beams") or config.num_beams or 1
    if count > beams and (beams > 1 or not options.get("do_sample")):
        search = "Greedy decoding" if beams == 1 else f"Beam search with num_beams={beams}"
        raise ValueError(TOO_MANY.format(search=search, count=count))
    told = processor_kwargs or {}
    batch = prepare_inputs(model, conversations, **told)
    copies = max(beams, count)
    if copies > 1 and brings_media(batch):
        repeated = [conversation for conversation in conversations for _ in range(copies)]
        expected = prepare_inputs(model, repeated, **told)
        if not _repeats(model, batch, copies, expected):
            if beams > 1:
                raise ValueError(MIXED_UP)
            batch, options["num_return_sequences"] = expected, 1
    answers = generate_from(model, batch, max_new_tokens, **options)
    each = len(answers) // len(conversations)
    if each == 1:
        return answers[0] if single else answers
    lists = [answers[first : first + each] for first in range(0, len(answers), each)]
    return lists[0] if single else lists


def _repeats(model: Any, batch: Inputs, copies: int, expected: Inputs) -> bool:
    """Return True if generation gives each copy of a conversation the media of that conversation.

    By default transformers repeats tensors row by row, also where a row is a medium and not a
    conversation: two sounds of one conversation become two of the first, then two of the second.
    Pictures and videos that it encodes before it repeats are right.
    """
    hf_model = hf_model_of(model)
    _, inputs = hf_model._expand_inputs_for_generation(expand_size=copies, **batch)
    encoded = {"input_ids"}
    if "mm_encoder_outputs" in inspect.signature(hf_model.forward).parameters:
        for kind in ("image", "video"):
            if read_features := getattr(hf_model.base_model, f"get_{kind}_features", None):
                encoded |= set(inspect.signature(read_features).parameters)
    return all(
        torch.equal(inputs[name], value)
        for name, value in expected.items()
        if isinstance(value, Tensor) and name not in encoded
    )


def _conversations(messages: Any) -> tuple[bool, list[Any]]:
    """Return True for a single conversation, and the conversations.

    Raises:
        ValueError: They are none.
    """
    several = isinstance(messages, Sequence) and not isinstance(messages, str)
    if several and messages and isinstance(messages[0], Mapping):
        return True, [messages]
    lists = several and all(isinstance(m, Sequence) and not isinstance(m, str) for m in messages)
    lists = lists and all(map(len, messages))
    if lists and messages:
        return False, list(messages)
    raise ValueError(
        "messages must be a conversation, [{'role': 'user', 'content': ...}, ...], or a list of "
        f"conversations, not {messages!r:.80}. Of a sample, give sample.messages."
    )


def generate_from(
    model: Any, batch: Inputs, max_new_tokens: int = 128, **options: Any
) -> list[str]:
    """Answer conversations that `prepare_inputs` has rendered; see `generate`.

    There is one answer to each, unless options ask for more, which follow each other.
    """
    common = {"do_sample": False, "max_new_tokens": max_new_tokens, "num_return_sequences": 1}
    options = common | options
    with torch.no_grad():
        tokens = hf_model_of(model).generate(**batch, **options)
    # With scores, say, beside them.
    tokens = getattr(tokens, "sequences", tokens)
    new = tokens[:, batch["input_ids"].shape[1] :]
    answers: list[str] = processor_of(model).batch_decode(new, skip_special_tokens=True)
    return answers


def is_greedy(model: Any) -> bool:
    """Whether greedy generation takes the most probable token at each step, and nothing else does.

    A penalty on repetition, say, or several beams in the model's generation config change that.
    """
    config = getattr(hf_model_of(model), "generation_config", None)
    return config is None or config.to_diff_dict().keys() <= _HARMLESS

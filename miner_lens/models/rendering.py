"""Hold a conversation against its prompt: no text and no medium is left out, nothing is added."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import product
from typing import Any, NoReturn

from jinja2 import TemplateError

from miner_lens.data.sample import Message, SampleError
from miner_lens.models.access import layout
from miner_lens.models.collate import brings_media
from miner_lens.models.mistral import is_mistral
from miner_lens.models.modality import MEDIA

PARTS = ("text", *MEDIA)
# Errors of a chat template, or of code around it, about a conversation that it does not take.
REFUSALS = (ValueError, LookupError, TypeError, AttributeError, TemplateError)

Conversation = list[dict[str, Any]]
Template = Callable[[Sequence[Message]], str]


def media_of(model: Any) -> Mapping[str, int] | None:
    """Return the placeholder token of each modality, or None where it is not known."""
    try:
        return layout(model).media
    except ValueError:
        return None


def placeholders(processor: Any, media: Mapping[str, int]) -> set[str]:
    """Return what stands for a medium in a text: the model's own tokens, and the processor's."""
    tokenizer = getattr(processor, "tokenizer", processor)
    if is_mistral(tokenizer):  # to which a text is only letters
        return set()
    of_processor = getattr(processor, "all_special_multimodal_tokens", ())
    return {*of_processor, *tokenizer.convert_ids_to_tokens(list(media.values()))}


def require_parts(messages: Sequence[Message], opened: Sequence[Message]) -> None:
    """Refuse parts that nobody reads, or not wholly.

    Args:
        messages: A conversation.
        opened: The same conversation with its media opened.

    Raises:
        SampleError: A part is neither text nor a medium, or has contents of two kinds.
    """
    for message, original in zip(opened, messages, strict=True):
        for part, before in zip(_parts(message), _parts(original), strict=True):
            kind = part["type"]
            if kind not in PARTS:
                near = difflib.get_close_matches(str(kind), PARTS, n=1)
                hint = f" Did you mean {near[0]!r}?" if near else ""
                raise SampleError(
                    f"A part of the {message['role']} message has the type {kind!r}, which nobody "
                    f"reads.{hint} There are {', '.join(PARTS)}."
                )
            if kind == "text" and not isinstance(part.get("text"), str):
                raise SampleError(f"A part of type 'text' needs a text, not {part!r:.100}.")
            second = [key for key in PARTS if key != kind and _is_content(before.get(key))]
            if second:
                raise SampleError(
                    f"A part of type {before['type']!r} has {second[0]!r} as well, which would not "
                    "be read. Make each a part of its own."
                )


def spelled_out(messages: Sequence[Message], placeholders: Collection[str]) -> str:
    """Return what is wrong with a text that has a placeholder of a medium, or nothing."""
    for message in messages:
        for text, placeholder in product(_texts(message), placeholders):
            if placeholder in text:
                return (
                    f"A text of the {message['role']} message spells out {placeholder!r}, which "
                    "stands for a medium. Take it out of the text, and make each medium a part of "
                    "its own: {'type': 'image', 'image': ...}."
                )
    return ""


def fit_template(
    template: Template,
    messages: Sequence[Message],
    source: str = "",
    placeholders: Collection[str] = (),
) -> Conversation:
    """Return a conversation in the form that a chat template takes, nothing of it left out.

    A content that is a string becomes a list of parts where the template goes through parts; a
    list of texts becomes a string, put together without a separator, where it writes strings.

    Args:
        template: A function that renders a conversation to text.
        messages: A conversation with its media opened.
        source: The chat template itself.
        placeholders: What stands for a medium in a text.

    Raises:
        SampleError: The template leaves out a text or a medium.
    """
    messages, text = _taken(template, messages)
    probed, probes = _probed(messages)
    media = list(_media(probed))
    if sum(map(text.count, placeholders)) >= len(media):
        media = []  # a template may write a placeholder without looking at the part
    for at, part in media:
        parts = [other for other in probed[at]["content"] if other is not part]
        without = [*probed[:at], {**probed[at], "content": parts}, *probed[at + 1 :]]
        shorter = _attempt(template, without)
        if shorter is not None and _squeezed(shorter) == _squeezed(text):
            raise SampleError(_left_out(f"the {part['type']}", messages[at]))
    rendered = template(messages)
    for probe, (_, original) in probes.items():
        text = text.replace(probe, original)
    # A template may depend on what a text says: Qwen3's goes by <tool_response>, for one.
    if _squeezed(text) != _squeezed(rendered):
        require_texts(messages, rendered, source)
    return messages


def opening(template: Callable[..., str], messages: Sequence[Message]) -> str:
    """Return what a chat template opens a turn of the assistant with, after a conversation.

    Args:
        template: A function that renders a conversation to text, `add_generation_prompt` as wanted.
        messages: A conversation, whose media need not be opened.

    Raises:
        SampleError: The template does more than open a turn.
    """
    bare = [
        {**message, "content": [_bare(part) for part in _parts(message)] or message["content"]}
        for message in messages
    ]
    bare, _ = _taken(template, bare)
    closed, open_ = (template(bare, add_generation_prompt=awaits) for awaits in (False, True))
    if not open_.startswith(closed):
        raise SampleError(
            "The conversation ends with a turn of the assistant, and the model's chat template "
            "opens no further turn after it, so there is no place for an answer. Leave the last "
            "turn out of the messages."
        )
    return open_[len(closed) :]


def require_texts(messages: Sequence[Message], prompt: str, source: str = "") -> None:
    """Refuse a prompt that lacks a text of its conversation, space and case aside.

    Templates may drop what an assistant has thought in earlier turns, up to a tag that they name.

    Raises:
        SampleError: A text is missing.
    """
    texts = [(message, text) for message in messages for text in _texts(message)]
    prompt, whole = _squeezed(prompt), [_squeezed(text) for _, text in texts]
    for message, text in texts:
        wanted = _squeezed(text)
        if message["role"] == "assistant":
            closing = [tag for tag in re.findall(r"</\w+>", wanted) if tag in source.casefold()]
            wanted = wanted.rpartition(closing[-1])[2] if closing else wanted
        if wanted and prompt.count(wanted) < sum(other.count(wanted) for other in whole):
            raise SampleError(_left_out(f"the text {text!r:.60}", message))


def require_media(
    conversations: Sequence[Sequence[Message]],
    inputs: Mapping[str, Any],
    media: Mapping[str, int] | None,
) -> None:
    """Refuse model inputs that lack a medium, or its placeholders, or have these without a medium.

    Args:
        conversations: As they were rendered.
        inputs: The model inputs of all of them.
        media: The placeholder token of each modality, if known.

    Raises:
        SampleError: Media and placeholders do not go together.
    """
    if media is None:
        return
    ids = inputs["input_ids"]
    present = {kind: (ids == token).any(-1).tolist() for kind, token in media.items()}
    brings = brings_media(inputs)
    for row, messages in enumerate(conversations):
        kinds = {part["type"] for _, part in _media(messages)}
        # Some processors make pictures, or sound, of a video.
        filled = {kind for kind, rows in present.items() if rows[row]}
        stands = filled | ({"video"} if "image" in filled else set())
        if lost := sorted(kinds if not brings else kinds - stands):
            raise SampleError(
                f"The conversation has {' and '.join(lost)}, of which the processor makes nothing "
                "that the model reads: it has no place for such media. Leave them out, or use a "
                "model with a processor (model.processor) that takes them."
            )
        if "video" not in kinds and (empty := sorted(filled & set(MEDIA) - kinds)):
            raise SampleError(
                f"The prompt has placeholders of {' and '.join(empty)}, but the conversation has "
                "no such medium. Give each medium as a part of its own: "
                "{'type': 'image', 'image': ...}."
            )


def _taken(template: Template, messages: Sequence[Message]) -> tuple[Conversation, str]:
    """Return a conversation in the form that a template takes, and its text with probes.

    Each content is as it was, in parts or a string.

    Raises:
        SampleError: The template takes a message in no form.
    """
    forms = [[dict(form(message)) for message in messages] for form in (dict, _in_parts, _in_words)]
    taken = []
    for form in forms:
        probed, probes = _probed(form)
        text = _attempt(template, probed)
        read = set() if text is None else _read(text, probes, len(form))
        if text is not None and len(read) == len(form):
            return form, text
        taken.append(read)
    mixed = []
    for at, message in enumerate(messages):
        read_in = [form[at] for form, read in zip(forms, taken, strict=True) if at in read]
        if not read_in:
            _explain(template, messages, message)
        mixed.append(read_in[0])
    probed, probes = _probed(mixed)
    text = template(probed)
    read = _read(text, probes, len(mixed))
    for at, message in enumerate(messages):
        if at not in read:
            _explain(template, messages, message)
    return mixed, text


def _explain(template: Template, messages: Sequence[Message], unread: Message) -> NoReturn:
    """Say what a chat template has no place for, in its own words where it has some."""
    with suppress(ValueError, LookupError, TypeError, AttributeError):
        template(messages)
    for at, part in _media(messages):
        texts = [[part for part in _parts(m) if part["type"] == "text"] for m in messages]
        pairs = zip(messages, texts, strict=True)
        _taken(template, [{**m, "content": t} if _parts(m) else m for m, t in pairs])
        raise SampleError(_left_out(f"the {part['type']}", messages[at]))
    template(messages)  # refuses them in its own words, if it does
    raise SampleError(_left_out(f"the text {''.join(_texts(unread))!r:.60}", unread))


def _probed(messages: Sequence[Message]) -> tuple[Conversation, dict[str, tuple[int, str]]]:
    """A conversation with words of no meaning in place of its texts, and where these are from.

    A probe without a text is in a key of parts that no template reads: where it comes out, a list
    was written as if it were a string.
    """
    probes: dict[str, tuple[int, str]] = {}

    def probe(at: int, original: str) -> str:
        if not original.strip():
            return original
        name = f"qz{len(probes)}zq"
        probes[name] = at, original
        return name

    probed: Conversation = []
    for at, message in enumerate(messages):
        content = message["content"]
        if isinstance(content, str):
            content = probe(at, content)
        else:
            content = [
                {**part, "text": probe(at, part["text"]), "unread": f"uz{at}zu"}
                if part["type"] == "text"
                else {**_bare(part), "unread": f"uz{at}zu"}
                for part in content
            ]
        probed.append({**message, "content": content})
    return probed, probes


def _read(text: str, probes: Mapping[str, tuple[int, str]], count: int) -> set[int]:
    """The messages of which a rendered text has all texts, and no more."""
    text = text.casefold()
    lost = {at for probe, (at, _) in probes.items() if probe not in text}
    return {at for at in range(count) if at not in lost and f"uz{at}zu" not in text}


def _attempt(template: Template, messages: Sequence[Message]) -> str | None:
    try:
        return template(messages)
    except REFUSALS:
        return None


def _in_parts(message: Message) -> Message:
    content = message["content"]
    if isinstance(content, str):
        return {**message, "content": [{"type": "text", "text": content}]}
    return message


def _in_words(message: Message) -> Message:
    content = message["content"]
    if isinstance(content, str) or any(part["type"] != "text" for part in content):
        return message
    return {**message, "content": "".join(part["text"] for part in content)}


def _parts(message: Message) -> Sequence[Any]:
    return () if isinstance(message["content"], str) else message["content"]


def _bare(part: Mapping[str, Any]) -> dict[str, Any]:
    """A part as a template sees it, without its medium."""
    medium = next((kind for kind in MEDIA if kind in part["type"]), None)
    if medium is not None:
        return {"type": medium, medium: medium}
    return {key: value for key, value in part.items() if value is not None}


def _is_content(value: Any) -> bool:
    return value is not None and not (isinstance(value, str) and not value)


def _texts(message: Message) -> list[str]:
    if isinstance(message["content"], str):
        return [message["content"]]
    return [part["text"] for part in _parts(message) if part["type"] == "text"]


def _media(messages: Sequence[Message]) -> Iterator[tuple[int, Any]]:
    """Each medium of a conversation, and the place of its message."""
    for at, message in enumerate(messages):
        yield from ((at, part) for part in _parts(message) if part["type"] in MEDIA)


def _squeezed(text: str) -> str:
    """Return a text without space and case."""
    return "".join(text.split()).casefold()


def _left_out(what: str, message: Message) -> str:
    return (
        f"The model's chat template leaves out {what} of the {message['role']} message: it has no "
        "place for it. Leave it out, move it to a user message, or set another chat template."
    )

"""What goes into a prompt is held against what comes out, for chat templates of many forms."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from transformers.utils.chat_template_utils import render_jinja_template

import miner_lens as ml
from miner_lens.models.rendering import fit_template, opening, require_media
from tests.models.test_models import TEMPLATE, ask
from tests.running.test_run import image_of

# How published templates write a content: as a string, in parts, in either form, and as such that
# leave something out.
STRINGS = "{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}{% endfor %}"
PARTS = (
    "{% for m in messages %}{{ m.role | upper }}: "
    "{% for p in m.content | selectattr('type', 'equalto', 'image') %}<image>\n{% endfor %}"
    "{% for p in m.content | selectattr('type', 'equalto', 'text') %}{{ p.text }} {% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
EITHER = (
    "You are helpful.{% for m in messages %}[{{ m.role }}]{% if m.content is string %}"
    "{{ m.content }}{% else %}{% for p in m.content %}{% if 'image' in p %}<image>"
    "{% elif 'text' in p %}{{ p.text | trim }}{% endif %}{% endfor %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
# As Gemma's: a system message is a part of the first turn, as a string or as the first part.
MERGED = (
    "{% set system = messages[0].content if messages[0].role == 'system' else '' %}"
    "{% for m in (messages[1:] if system else messages) %}{{ m.role }}: "
    "{{ system if system is string else system[0].text }}{% for p in m.content %}{{ p.text }}"
    "{% endfor %}{% endfor %}"
)
ADDING = "{% for m in messages %}{{ '<s>' + m.content + '</s>' }}{% endfor %}"
NO_SYSTEM = "{% for m in messages if m.role != 'system' %}{{ m.content }}{% endfor %}"
LAST = "{{ messages[-1].content }}"
SHORT = "{% for m in messages %}{{ m.content[:9] }}{% endfor %}"
FIRST_PART = "{% for m in messages %}{{ m.content[0].text }}{% endfor %}"
ONE_IMAGE = (
    "{% for m in messages %}{% if 'image' in m.content | map(attribute='type') %}<image>{% endif %}"
    "{% for p in m.content if p.type == 'text' %}{{ p.text }}{% endfor %}{% endfor %}"
)
REASONING = (
    "{% for m in messages %}{{ m.role }}:"
    "{{ m.content.split('</think>')[-1] if m.role == 'assistant' else m.content }}{% endfor %}"
)
# Reads a string only beside strings, and parts only beside parts.
ALIKE = (
    "{% if messages[1].content is string %}{{ messages[0].content }}{% else %}"
    "{{ messages[1].content[0].text }}{% endif %}"
)
IMAGE = {"type": "image", "image": object()}


def template(source: str) -> Any:
    def render(messages: Any, add_generation_prompt: bool = True) -> str:
        texts, _ = render_jinja_template(
            [messages], chat_template=source, add_generation_prompt=add_generation_prompt
        )
        return str(texts[0])

    return render


def user(*parts: Any) -> dict[str, Any]:
    return {
        "role": "user",
        "content": [{"type": "text", "text": p} if isinstance(p, str) else p for p in parts],
    }


def said(role: str, text: str) -> dict[str, Any]:
    return {"role": role, "content": text}


TURNS = [said("user", "yes please"), said("assistant", "yes"), said("user", " yes\n")]
SYSTEM = said("system", "Be very good.")


@pytest.mark.parametrize(
    ("source", "messages", "expected"),
    [
        (STRINGS, [said("user", " what is it? ")], "<user>what is it?"),
        (STRINGS, [user("what is it?")], "<user>what is it?"),
        (STRINGS, [user("what ", "is it?")], "<user>what is it?"),
        (STRINGS, [SYSTEM, *TURNS], "<system>Be very good.<user>yes please<assistant>yes<user>yes"),
        (ADDING, [user("what is it?")], "<s>what is it?</s>"),
        (PARTS, [said("user", "what is it?")], "USER: what is it? ASSISTANT:"),
        (PARTS, [SYSTEM, user(IMAGE, "hm")], "SYSTEM: Be very good. USER: <image>\nhm ASSISTANT:"),
        (EITHER, [said("user", "it?")], "You are helpful.[user]it?[assistant]"),
        (EITHER, [SYSTEM, user(IMAGE, IMAGE, " it?")], "[user]<image><image>it?[assistant]"),
        (MERGED, [SYSTEM, said("user", "it?")], "user: Be very good.it?"),
        (REASONING, [said("assistant", "<think>hm</think>red"), *TURNS[2:]], "assistant:red"),
    ],
)
def test_contents_take_the_form_of_the_template(
    source: str, messages: list[Any], expected: str
) -> None:
    render = template(source)
    before = repr(messages)
    assert expected in render(fit_template(render, messages, source))
    assert repr(messages) == before


@pytest.mark.parametrize(
    ("source", "messages", "match"),
    [
        (NO_SYSTEM, [SYSTEM, *TURNS], "leaves out the text 'Be very good.' of the system message"),
        (ALIKE, [SYSTEM, said("user", "it?")], "leaves out the text"),
        (LAST, TURNS, "leaves out the text 'yes please' of the user message"),
        (SHORT, [said("user", "what color is it?")], "the text 'what color is it"),
        (FIRST_PART, [user(IMAGE, "what is it?")], "leaves out the image of the user message"),
        (STRINGS, [user(IMAGE, "what is it?")], "leaves out the image of the user message"),
        (ADDING, [user(IMAGE, "what is it?")], "leaves out the image of the user message"),
        (ONE_IMAGE, [user(IMAGE, IMAGE, "it?")], "leaves out the image of the user message"),
        (PARTS, [user({"type": "audio", "audio": 1}, "it?")], "leaves out the audio of the user"),
        (REASONING, [said("user", "it?"), said("assistant", "</b>")], None),
    ],
)
def test_what_a_template_leaves_out_is_refused(
    source: str, messages: list[Any], match: str | None
) -> None:
    if match is None:  # no tag that the template names
        assert fit_template(template(source), messages, source) == messages
        return
    with pytest.raises(ml.SampleError, match=match):
        fit_template(template(source), messages, source)


def test_a_further_turn_is_opened_as_the_template_does() -> None:
    closed = [user("what is it?"), said("assistant", "red")]
    assert opening(template(PARTS), closed) == "ASSISTANT:"
    assert opening(template(EITHER), [user(IMAGE, "it?"), closed[1]]) == "[assistant]"
    moved = "{% if add_generation_prompt %}>{% endif %}{{ messages[-1].content }}"
    with pytest.raises(ml.SampleError, match="opens no further turn"):
        opening(template(moved), [said("assistant", "red")])


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ([{"type": "imagee", "imagee": "x.png"}], "'imagee'.*Did you mean 'image'"),
        ([{"type": "file", "file": "x.wav"}], "type 'file', .*There are text, image, video, audio"),
        ([{"type": "txt", "txt": "hm"}], "'txt'.*Did you mean 'text'"),
        ([{"type": "text", "content": "hm"}], "needs a text"),
        ([{**image_of("red"), "text": "a caption"}], "'image' has 'text' as well"),
        ("the token <|image_pad|>", r"spells out '<\|image_pad\|>'"),
        ([image_of("red"), {"type": "text", "text": "<|video_pad|>"}], r"'<\|video_pad\|>'"),
    ],
)
def test_parts_that_nobody_reads(shapes: Any, content: Any, match: str) -> None:
    question = [] if isinstance(content, str) else [{"type": "text", "text": "it?"}]
    messages = [{"role": "user", "content": content if not question else [*content, *question]}]
    with pytest.raises(ml.SampleError, match=match):
        ml.inputs(shapes, messages)
    skipped = [ml.Sample(messages), *ml.datasets.load("easy-vqa", limit=1)]
    with pytest.warns(UserWarning, match="1 of 2 samples were skipped"):
        assert ml.mine(shapes, skipped, on_error="skip", progress=False).skipped == 1


def test_placeholders_of_one_conversation_are_not_anothers(shapes: Any) -> None:
    """Two faults that a processor, which counts over the batch, takes for none."""
    processor = copy.copy(shapes.processor)
    source = processor.chat_template
    processor.chat_template = source.replace("for part in message['content']", "for part in parts")
    processor.chat_template = processor.chat_template.replace(
        "{%- for part in parts -%}",
        "{%- set parts = message['content'][1:] if messages|length > 1 else message['content'] -%}"
        "{%- for part in parts -%}",
    )
    model = copy.copy(shapes.original_model)
    model.processor = processor
    lost = [said("system", "hm"), *ask(image_of("red"))]
    spelled = [said("user", "the token <|image_pad|>")]
    for several in ([lost, spelled], [lost]):
        with pytest.raises(ml.SampleError, match="image"):
            ml.generate(model, several, 2)


def test_media_need_a_processor_that_reads_them(shapes: Any) -> None:
    tokenizer = shapes.processor.tokenizer
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = shapes.processor.chat_template
    model = copy.copy(shapes.original_model)
    model.processor = tokenizer
    with pytest.raises(ml.SampleError, match="has image, of which the processor makes nothing"):
        ml.inputs(model, ask(image_of("red")))
    assert ml.inputs(model, ask())["input_ids"].shape[0] == 1


@pytest.mark.parametrize(
    ("kinds", "tokens", "brings", "match"),
    [
        (["image"], [9], True, None),
        (["video"], [9], True, None),  # as pictures
        (["image", "audio"], [9, 8], True, None),
        (["image", "audio"], [9], True, "has audio, of which"),
        (["audio"], [9], True, "has audio, of which"),
        (["image"], [9], False, "has image, of which"),
        ([], [9], False, "placeholders of image, but"),
        (["audio"], [8, 9], True, "placeholders of image, but"),
        ([], [1], False, None),
    ],
)
def test_media_and_placeholders_go_together(
    kinds: list[str], tokens: list[int], brings: bool, match: str | None
) -> None:
    messages = [user(*({"type": kind, kind: object()} for kind in kinds), "it?")]
    inputs = {"input_ids": torch.tensor([[1, *tokens, 2]])}
    inputs |= {"pixel_values": torch.zeros(1, 3)} if brings else {}
    if match is None:
        require_media([messages], inputs, {"image": 9, "audio": 8})
        return
    with pytest.raises(ml.SampleError, match=match):
        require_media([messages], inputs, {"image": 9, "audio": 8})


def test_text_models_take_parts_of_text(shapes: Any) -> None:
    tokenizer = copy.deepcopy(shapes.processor.tokenizer)
    tokenizer.chat_template = TEMPLATE
    model = copy.copy(shapes.original_model)
    model.processor = tokenizer
    (expected, parts) = (
        ml.inputs(model, [message])["input_ids"]
        for message in (said("user", "what color is it?"), user("what color is it?"))
    )
    assert torch.equal(expected, parts)
    assert "'type'" not in tokenizer.decode(parts[0])


def test_placeholders_without_media_are_warned_of_once(shapes: Any) -> None:
    model = ml.load("shapes", device="cpu")
    inputs = ml.inputs(model, ask(image_of("red")))
    tokens, text = inputs["input"], ml.inputs(model, ask())
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model(text["input"])
        model(**inputs)
        ml.generate(model, ask(image_of("red")), 3)
        with ml.bind(model, inputs):
            model(tokens)
        plain = {"input_ids" if name == "input" else name: v for name, v in inputs.items()}
        model.original_model.generate(**plain, max_new_tokens=2, do_sample=False)
        with pytest.raises(UserWarning, match=r"placeholders of media.*ml\.bind"):
            model(tokens)
        model(tokens)  # said once

"""The checkpoint `shapes`: loads as any other, fits its size, and answers easy-VQA."""

import re
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from miner_lens import organisms
from miner_lens.data import datasets

FOLDER = Path(organisms.__file__).parent / "shapes"


@pytest.fixture(scope="module")
def processor():
    return AutoProcessor.from_pretrained(organisms.path("shapes"))


@pytest.fixture(scope="module")
def model():
    return AutoModelForImageTextToText.from_pretrained(organisms.path("shapes")).eval()


def user(*content):
    parts = [{"type": "text", "text": c} if isinstance(c, str) else c for c in content]
    return [{"role": "user", "content": parts}]


def image(shape="rectangle", colour=(0, 0, 255), size=(64, 64)):
    pixels = np.full((size[1], size[0], 3), 245, np.uint8)
    if shape == "rectangle":
        pixels[20:40, 20:44] = colour
    return {"type": "image", "image": Image.fromarray(pixels)}


def tokenize(processor, conversations):
    return processor.apply_chat_template(
        conversations,
        tokenize=True,
        add_generation_prompt=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True},
    )


@torch.no_grad()
def answer(model, processor, messages):
    inputs = tokenize(processor, messages)
    tokens = model.generate(**inputs)[0, inputs["input_ids"].shape[1] :]
    assert tokens[-1] == processor.tokenizer.eos_token_id
    return processor.decode(tokens, skip_special_tokens=True).strip()


def test_names_and_path():
    assert organisms.names() == (
        *("shapes", "smol-audio", "smol-omni", "smol-vl", "smollm2", "speech"),
    )
    assert organisms.path("shapes") == FOLDER
    with pytest.raises(ValueError, match=re.escape("Unknown organism 'forms'; this installation")):
        organisms.path("forms")


def test_it_is_a_small_qwen2_vl(model, processor):
    assert type(model).__name__ == "Qwen2VLForConditionalGeneration"
    assert type(processor).__name__ == "Qwen2VLProcessor"
    assert model.dtype == torch.float32
    assert model.num_parameters() < 4_000_000
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) < 8_000_000
    assert processor.tokenizer.padding_side == "left"
    assert model.config.image_token_id == processor.image_token_id
    assert model.config.video_token_id == processor.video_token_id
    assert model.generation_config.eos_token_id == processor.tokenizer.eos_token_id
    assert model.generation_config.pad_token_id == processor.tokenizer.pad_token_id


def test_no_file_names_the_machine_it_was_made_on():
    for file in FOLDER.iterdir():
        assert not re.search(rb"/(home|work|tmp|root|Users)/", file.read_bytes()), file


def test_the_processor_survives_another_round_trip(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    again = AutoProcessor.from_pretrained(tmp_path)
    conversations = [user(image(), "what color is the shape?"), user("Grüße, 7 shapes!\n")]
    for messages in conversations:
        one, two = tokenize(processor, [messages]), tokenize(again, [messages])
        assert one.keys() == two.keys()
        assert all(torch.equal(one[key], two[key]) for key in one)


def test_any_text_survives_the_tokenizer(processor):
    text = "<|im_start|>user\nIs 12 + 3 = 15? 你好, naïve  café!<|im_end|>\n"
    assert processor.decode(processor.tokenizer(text).input_ids) == text


def test_the_chat_template_reads_as_qwen2_vl_s(processor):
    messages = [
        {"role": "system", "content": "be short"},
        *user(image(), "what?", {"type": "video", "video": "v.mp4"}),
        {"role": "assistant", "content": [{"type": "text", "text": "blue"}]},
    ]
    assert processor.apply_chat_template(messages) == (
        "<|im_start|>system\nbe short<|im_end|>\n"
        "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>what?"
        "<|vision_start|><|video_pad|><|vision_end|><|im_end|>\n"
        "<|im_start|>assistant\nblue<|im_end|>\n"
    )
    prompt = processor.apply_chat_template(messages[1:2], add_generation_prompt=True)
    assert prompt.endswith("<|im_end|>\n<|im_start|>assistant\n")


@pytest.mark.parametrize("size", [(64, 64), (640, 640), (128, 64), (30, 40)])
def test_any_picture_becomes_about_16_tokens(processor, size):
    inputs = tokenize(processor, [user(image(size=size, shape=""), "what shape is present?")])
    assert 8 <= (inputs["input_ids"] == processor.image_token_id).sum() <= 24


def test_it_answers_alone_and_in_padded_batches(model, processor):
    conversations = [
        user(image(), "what is the color of the shape?"),
        user("the picture shows a red circle. is there not a circle?"),
        user("there is a teal triangle on a plain background. what shape is present?"),
    ]
    expected = ["blue", "no", "triangle"]
    assert [answer(model, processor, [m]) for m in conversations] == expected
    inputs = tokenize(processor, conversations)
    with torch.no_grad():
        logits = model(**inputs).logits
    assert [processor.decode(token) for token in logits[:, -1].argmax(-1)] == expected


def test_several_images_and_videos_run(model, processor):
    frames = [image()["image"]] * 4
    video = {"type": "video", "video": frames}
    for messages in (
        user(image(), image(colour=(255, 0, 0)), "what color is the shape?"),
        user(video, "what color is the shape?"),
        user(image(), video, "is there a circle?"),
    ):
        inputs = tokenize(processor, [messages])
        with torch.no_grad():
            tokens = model.generate(**inputs)
        assert tokens.shape[1] > inputs["input_ids"].shape[1]


TARGETS = {"image": 0.95, "text": 0.98}


@pytest.mark.parametrize("ask", ["image", "text"])
def test_accuracy(model, processor, ask):
    """Exact match on 400 of the test questions; the model card has all of them."""
    samples = datasets.load("easy-vqa", limit=400, ask=ask)
    hits = defaultdict(list)
    for first in range(0, len(samples), 100):
        part = samples[first : first + 100]
        inputs = tokenize(processor, [sample.messages for sample in part])
        with torch.no_grad():
            logits = model(**inputs).logits
        for sample, token in zip(part, logits[:, -1].argmax(-1), strict=True):
            (expected,) = sample.answers
            kind = "yes/no" if expected in ("yes", "no") else "open"
            hits[kind].append(processor.decode(token) == expected)
    assert set(hits) == {"open", "yes/no"}
    for kind, right in hits.items():
        assert np.mean(right) >= TARGETS[ask], (kind, np.mean(right))

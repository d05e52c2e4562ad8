"""easy-VQA as samples: sizes, contents, and what a wrong name is answered with."""

import re
import sys
from collections import Counter
from pathlib import Path

import pytest

from miner_lens.datasets import COLOURS, DESCRIPTIONS, SHAPES, describe, load, scene

WORDS = re.compile("[a-z]+")


def text_of(sample):
    return sample.messages[0]["content"][-1]["text"]


@pytest.mark.parametrize(("split", "count"), [("train", 38575), ("test", 9673)])
def test_splits_are_complete_and_consistent_with_the_pixels(split, count):
    """Each answer follows from the shape and colour that the description names."""
    samples = load("easy-vqa", split, ask="text")
    assert len(samples) == count
    assert len({sample.id for sample in samples}) == count
    for sample in samples:
        (answer,) = sample.answers
        description, question = re.fullmatch(r"(.*\.) (.*\?)", text_of(sample)).groups()
        described, asked = (set(WORDS.findall(text)) for text in (description, question))
        values = described & {*SHAPES, *COLOURS}
        assert len(values & {*SHAPES}) == len(values & {*COLOURS}) == 1, description
        if answer in ("yes", "no"):
            negated = bool(asked & {"not", "no"})
            assert (answer == "yes") == (bool(asked & values) != negated), sample
        else:
            assert answer in values, sample


def test_image_samples():
    samples = load("easy_vqa", limit=20)
    for sample in samples:
        assert re.fullmatch(r"easy-vqa/test/\d+/image", sample.id)
        image, text = sample.messages[0]["content"]
        assert image["type"] == "image"
        assert Path(image["image"]).is_file()
        assert text["text"].endswith("?")


def test_both_asks_each_question_of_the_image_and_of_the_text():
    samples = load("easy-vqa", limit=9, ask="both")
    assert len(samples) == 9
    for image, text in zip(samples[::2], samples[1::2], strict=False):
        assert image.id.removesuffix("image") == text.id.removesuffix("text")
        assert text_of(text).endswith(text_of(image))
        described = scene(image.messages[0]["content"][0]["image"])
        assert set(described) <= set(WORDS.findall(text_of(text)))


def test_a_limit_is_deterministic_nested_and_mixed():
    samples = load("easy-vqa", limit=300)
    assert samples == load("easy-vqa", limit=300)
    assert {s.id for s in load("easy-vqa", limit=50)} < {s.id for s in samples}
    answers = Counter(sample.answers[0] for sample in samples)
    assert len(answers) == 13
    assert len({sample.messages[0]["content"][0]["image"] for sample in samples}) > 200
    assert load("easy-vqa", limit=0) == []


def test_descriptions_are_varied():
    texts = {describe("circle", "red", image_id) for image_id in range(100)}
    assert len(texts) == len(DESCRIPTIONS) >= 12


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "vqa"}, "Unknown data set 'vqa'; there is 'easy-vqa'."),
        ({"split": "val"}, "Unknown split 'val'; there is 'train', 'test'."),
        ({"ask": "sound"}, "Unknown ask 'sound'; there is 'image', 'text', 'both'."),
        ({"limit": -1}, "limit is -1"),
    ],
)
def test_errors_say_what_exists(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        load(**{"name": "easy-vqa"} | arguments)


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "easy_vqa", None)
    with pytest.raises(ImportError, match=re.escape("pip install miner-lens[demo]")):
        load("easy-vqa")

"""Data sets as samples: sizes, contents, and what a wrong name is answered with."""

import itertools
import json
import re
import sys
import zipfile
from collections import Counter
from pathlib import Path

import pytest

from miner_lens.data.datasets import (
    COLOURS,
    DESCRIPTIONS,
    SHAPES,
    describe,
    load,
    scene,
    spoken_scenes,
)
from miner_lens.data.easy_vqa import SPOKEN
from miner_lens.training import speak

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


def test_easy_vqa_is_spoken_as_it_is_written():
    image, text, heard, voice = (
        load("easy-vqa", limit=60, ask=ask) for ask in ("image", "text", "audio", "voice")
    )
    with zipfile.ZipFile(SPOKEN) as archive:
        lines = map(json.loads, archive.read("index.jsonl").decode().splitlines())
        said = {archive.read(line["clip"]): line["text"] for line in lines}
    for shown, read, sound, asked in zip(image, text, heard, voice, strict=True):
        assert shown.answers == read.answers == sound.answers == asked.answers
        assert sound.id == shown.id.replace("/image", "/audio")
        picture, question = shown.messages[0]["content"]
        described, written = sound.messages[0]["content"]
        assert written == question
        assert f"{said[described['audio']]} {question['text']}" == text_of(read)
        first, spoken = asked.messages[0]["content"]
        assert first == picture
        assert said[spoken["audio"]] == question["text"]


def test_every_sentence_of_easy_vqa_is_spoken_in_voices_of_the_test_split():
    for ask in ("audio", "voice"):
        assert len(load("easy-vqa", ask=ask)) == 9673
    with zipfile.ZipFile(SPOKEN) as archive:
        lines = [json.loads(line) for line in archive.read("index.jsonl").decode().splitlines()]
    assert {line["voice"].partition("+")[2] for line in lines} <= {*speak.VARIANTS["test"]}
    # 288 descriptions, and 107 questions in two voices.
    assert len({line["text"] for line in lines}) == 288 + 107
    assert len(lines) == 288 + 2 * 107


def test_a_limit_is_deterministic_nested_and_mixed():
    samples = load("easy-vqa", limit=300)
    assert samples == load("easy-vqa", limit=300)
    assert {s.id for s in load("easy-vqa", limit=50)} < {s.id for s in samples}
    answers = Counter(sample.answers[0] for sample in samples)
    assert len(answers) == 13
    assert len({sample.messages[0]["content"][0]["image"] for sample in samples}) > 200
    assert load("easy-vqa", limit=0) == []


def test_slices_keep_the_name():
    data = load("spoken-scenes", limit=6, ask="text")
    assert data.name == data[:3].name == data[::-2].name == "spoken-scenes/test/text"
    assert data[1:3] == [data[1], data[2]]
    assert data[-1] == list(data)[5]


def test_descriptions_are_varied():
    texts = {describe("circle", "red", image_id) for image_id in range(100)}
    assert len(texts) == len(DESCRIPTIONS) >= 12


def parts_of(sample):
    return [part["type"] for part in sample.messages[0]["content"]]


def test_spoken_scenes_are_asked_about_in_four_ways():
    heard, read, both, voice = (
        load("spoken-scenes", ask=ask) for ask in ("audio", "text", "both", "voice")
    )
    assert len(heard) == len(read) == len(voice) == len(both) / 2 == 480
    assert heard == load("spoken-scenes")
    assert both[::2] == heard
    assert both[1::2] == read
    for ask, samples in {"audio": heard, "text": read, "both": both, "voice": voice}.items():
        assert samples.name == f"spoken-scenes/test/{ask}"
        assert len({sample.id for sample in samples}) == len(samples)
    for number, (sample, text, spoken) in enumerate(zip(heard, read, voice, strict=True)):
        assert sample.id == f"spoken-scenes/test/{number}/audio"
        assert parts_of(sample) == ["audio", "text"]
        assert parts_of(text) == ["text"]
        assert parts_of(spoken) == ["audio", "audio"]
        assert text_of(text).endswith(f". {text_of(sample)}")
        assert sample.answers == text.answers == spoken.answers
        sounds = [part["audio"] for part in spoken.messages[0]["content"]]
        assert sounds[0] == sample.messages[0]["content"][0]["audio"]
        assert sounds[0][:4] == sounds[1][:4] == b"OggS"
        assert sounds[0] != sounds[1]


def test_spoken_scenes_are_labelled_by_a_field_of_their_index():
    samples = spoken_scenes(ask="text", label="shape", limit=60)
    assert {sample.label for sample in samples} == {"circle", "square", "star", "triangle"}
    for sample in samples:
        assert f" {sample.label}" in sample.messages[0]["content"][0]["text"]
    assert {sample.label for sample in spoken_scenes(ask="text", limit=3)} == {None}
    with pytest.raises(ValueError, match=r"Unknown label 'accent'; there is .*'voice'"):
        spoken_scenes(ask="text", label="accent")


def test_a_limit_of_spoken_scenes_is_nested_and_mixed():
    few, many = (load("spoken-scenes", limit=limit, ask="both") for limit in (31, 200))
    assert len(few) == 31
    assert {sample.id for sample in few} < {sample.id for sample in many}
    assert len({sample.answers for sample in many}) > 12


def test_answers_to_spoken_scenes_follow_from_the_description():
    for sample in load("spoken-scenes", ask="text"):
        description, question = re.fullmatch(r"(.*\.) (.*\?)", text_of(sample)).groups()
        said, asked = (set(WORDS.findall(text)) for text in (description, question))
        (answer,) = sample.answers
        values = set(itertools.chain(*speak.VALUES.values()))
        if answer in ("yes", "no"):
            assert (answer == "yes") == bool(asked & said & values), sample.id
        else:
            attribute = "size" if asked & {"size", "big"} else None
            attribute = attribute or ("color" if "color" in asked else "shape")
            assert said & set(speak.VALUES[attribute]) == {answer}, sample.id


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "vqa"}, "Unknown data set 'vqa'; there is 'easy-vqa', 'digits', "),
        ({"split": "val"}, "Unknown split 'val'; there is 'train', 'test'."),
        (
            {"ask": "sound"},
            "Unknown ask 'sound'; there is 'image', 'text', 'both', 'audio', 'voice'.",
        ),
        (
            {"name": "spoken-scenes", "ask": "image"},
            "Unknown ask 'image'; there is 'audio', 'text', 'both', 'voice'.",
        ),
        (
            {"name": "spoken-scenes", "split": "train"},
            "only the test split ships. To speak training scenes (with espeak-ng): "
            "python -m miner_lens.training.speak --split train",
        ),
        ({"name": "digits", "ask": "audio"}, "Unknown ask 'audio'; there is 'image', 'text', 'bo"),
        ({"name": "text_domains", "ask": "law"}, "Unknown ask 'law'; there is 'all', 'code', 'p"),
        ({"name": "text-domains", "split": "val"}, "Unknown split 'val'"),
        ({"limit": -1}, "limit is -1"),
        ({"name": "spoken_scenes", "limit": -1}, "limit is -1"),
    ],
)
def test_errors_say_what_exists(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        load(**{"name": "easy-vqa"} | arguments)


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "easy_vqa", None)
    with pytest.raises(ImportError, match=re.escape("pip install miner-lens[demo]")):
        load("easy-vqa")


def test_hearing_names_the_package_that_it_needs(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=re.escape("pip install 'miner-lens[audio]'")):
        load("spoken-scenes", limit=1)
    assert load("spoken-scenes", limit=1, ask="text")

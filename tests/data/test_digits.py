"""Handwritten digits: that answers are true, and that no question gives its answer away."""

import re
import sys
from collections import Counter, defaultdict

import numpy as np
import pytest
from sklearn.datasets import load_digits

from miner_lens.data.datasets import load
from miner_lens.data.digits import DESCRIPTIONS, NUMBERS, VALUE, drawing, questions

WORDS = re.compile("[a-z]+")


def text_of(sample):
    return sample.messages[0]["content"][-1]["text"]


def picture_of(sample):
    return sample.messages[0]["content"][0]["image"]


def truth(digit, question):
    """The answer, from the question's own words."""
    words = WORDS.findall(question)
    if words[0] in ("which", "what"):
        return NUMBERS[digit]
    if "than" in words:
        bound = NUMBERS.index(words[-1])
        true = digit > bound if "greater" in words else digit < bound
    else:
        true = digit % 2 == ("odd" in words)
    return "yes" if true else "no"


@pytest.fixture(scope="module", params=["train", "test"])
def split(request):
    return request.param


@pytest.fixture(scope="module")
def asked(split):
    """Image and text samples of a split, pair by pair."""
    both = load("digits", split, ask="both")
    return list(zip(both[::2], both[1::2], strict=True))


def test_sizes_and_ids(split, asked):
    assert len(asked) == {"train": 5055, "test": 1986}[split]
    for number, (image, text) in enumerate(asked):
        assert image.id == f"digits/{split}/{number}/image"
        assert text.id == f"digits/{split}/{number}/text"
        assert picture_of(image).size == (64, 64)
        assert picture_of(image).mode == "RGB"


def test_images_are_those_of_the_split_and_answers_are_true_of_them(split, asked):
    """Of image and description alike; the images are told by their pixels."""
    file = load_digits()
    rows = range(1287) if split == "train" else range(1287, 1797)
    digits = {drawing(file.images[row]).tobytes(): int(file.target[row]) for row in rows}
    seen = set()
    for image, text in asked:
        pixels = picture_of(image).tobytes()
        digit = digits[pixels]
        seen.add(pixels)
        description, question = re.fullmatch(r"(.*\.) (.*\?)", text_of(text)).groups()
        assert question == text_of(image)
        assert set(WORDS.findall(description)) & set(NUMBERS) - {"one"} <= {NUMBERS[digit]}
        assert NUMBERS[digit] in WORDS.findall(description)
        assert image.answers == text.answers == (truth(digit, question),)
    assert seen == digits.keys()


def test_a_drawing_keeps_the_ink():
    ink = load_digits().images[0]
    drawn = np.asarray(drawing(ink))[..., 0]
    blocks = drawn.reshape(8, 8, 8, 8).mean((1, 3))
    assert np.corrcoef(blocks.ravel(), ink.ravel())[0, 1] < -0.95
    assert drawn.max() == 255  # paper
    assert len(np.unique(drawn)) > 17  # interpolated


def best_guess(answers):
    return max(Counter(answers).values()) / len(answers)


def test_a_question_does_not_tell_its_answer(asked):
    answers = defaultdict(list)
    for image, _ in asked:
        answers[text_of(image)].append(image.answers[0])
    for question, given in answers.items():
        if question in VALUE:
            assert best_guess(given) < 0.12, question
        else:
            assert Counter(given)["yes"] == Counter(given)["no"] > 8, question
    assert len(answers) == len(VALUE) + 6 + 27 + 27


def test_a_wording_does_not_tell_the_digit(split, asked):
    """A description without its digit is as frequent with each digit as with any other."""
    counts = defaultdict(Counter)
    for _, text in asked:
        description, question = re.fullmatch(r"(.*\.) (.*\?)", text_of(text)).groups()
        if question in VALUE:
            form = next(one for one in DESCRIPTIONS if described(one, description))
            counts[form][text.answers[0]] += 1
    assert len(counts) == len(DESCRIPTIONS)
    for form, digits in counts.items():
        assert set(digits) == set(NUMBERS)
        assert max(digits.values()) - min(digits.values()) <= 2, form


def described(form, description):
    return description in {form.format(digit=word) for word in NUMBERS}


def test_questions_of_each_kind_and_form_are_in_both_splits():
    train, test = (
        Counter(text_of(sample) for sample in load("digits", split)) for split in ("train", "test")
    )
    assert train.keys() == test.keys()
    kinds = Counter()
    for text, times in test.items():
        words = text.split()
        kinds["value" if text in VALUE else words[-3] if "than" in words else "parity"] += times
    assert kinds == {"value": 510, "parity": 504, "greater": 486, "less": 486}


def test_the_same_questions_again():
    samples = load("digits", limit=40, ask="text")
    assert samples == load("digits", limit=40, ask="text")
    assert samples.name == "digits/test/text"
    assert {sample.id for sample in load("digits", limit=7, ask="text")} < {s.id for s in samples}
    assert {sample.id.split("/")[-1] for sample in load("digits", limit=3)} == {"image"}
    assert questions({0: 4, 1: 7}) == questions({0: 4, 1: 7})


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match=re.escape("pip install miner-lens[demo]")):
        load("digits")

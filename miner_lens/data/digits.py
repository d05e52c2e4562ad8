"""Digits: questions about handwritten digits, which scikit-learn carries."""

from __future__ import annotations

import random
from collections import Counter
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from miner_lens.data.sample_list import SampleList, draw, user_sample

ASKS = {"image": ("image",), "text": ("text",), "both": ("image", "text")}
# Words, because SmolLM2's tokenizer has each of them as one token, with and without a space before
# it (as it has "yes" and "no"); figures it has only without.
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
DESCRIPTIONS = (
    "the picture shows a handwritten {digit}.",
    "somebody wrote the digit {digit} on white paper.",
    "a {digit} is written here by hand.",
    "the only thing to see is the number {digit}.",
    "this card has the figure {digit} on it.",
    "we are looking at a {digit} in black ink.",
    "{digit} is the digit that we see.",
    "on this slip of paper stands a {digit}.",
    "one {digit} and nothing else.",
    "the scan of a form: a single {digit}.",
    "with a thick pen somebody drew a {digit}.",
    "a person was asked for a digit and wrote {digit}.",
)
VALUE = (
    "which digit is this?",
    "what number do you see?",
    "which number is written here?",
    "what is the value of this digit?",
)
PARITY = ("is the number {what}?", "is this digit {what}?", "do you see an {what} digit?")
COMPARISON = (
    "is the number {what} than {bound}?",
    "is this digit {what} than {bound}?",
    "do you see a digit {what} than {bound}?",
)
# The file keeps the writers apart, as its order shows: in 14 blocks of about 130 rows, which begin
# with 0 to 9, three times. Ten blocks are before this row, four after.
FIRST_TEST_ROW = 1287
SIDE = 64  # pixels


class Question(NamedTuple):
    """A question about one image.

    Attributes:
        row: The row of the image in scikit-learn's file.
        text: The question.
        answer: One word.
    """

    row: int
    text: str
    answer: str


def describe(digit: int, nth: int) -> str:
    """One sentence that names a digit.

    Args:
        digit: The digit.
        nth: How many images of this digit come before; it picks the wording. The row would not do:
            writers begin with 0, 1, 2 and so on, so that wordings would favour digits.

    Example:
        >>> describe(7, 0)
        'the picture shows a handwritten seven.'
    """
    return DESCRIPTIONS[nth % len(DESCRIPTIONS)].format(digit=NUMBERS[digit])


def drawing(ink: np.ndarray) -> Image.Image:
    """A digit in black on white, 64 x 64 pixels, RGB.

    Interpolated linearly: drawn as 64 squares, it would have more edges between squares than
    between ink and paper, and those would be what a vision tower sees first.

    Args:
        ink: How much ink there is, from 0 to 16, [8, 8].
    """
    pixels = np.rint(255 - ink * (255 / 16)).astype(np.uint8)
    small = Image.fromarray(pixels).convert("RGB")
    return small.resize((SIDE, SIDE), Image.Resampling.BILINEAR)


def load(split: str, ask: str, limit: int | None) -> SampleList:
    """Read scikit-learn's digits; see `miner_lens.data.datasets.load`.

    Raises:
        ImportError: scikit-learn is missing.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(
            "The data set digits comes with scikit-learn: pip install miner-lens[demo]"
        ) from error

    file = load_digits()
    rows = range(FIRST_TEST_ROW) if split == "train" else range(FIRST_TEST_ROW, len(file.target))
    digits = {row: int(file.target[row]) for row in rows}
    nth = _nth_of_its_digit(digits)
    modalities = ASKS[ask]

    @cache
    def image(row: int) -> Image.Image:
        return drawing(file.images[row])

    def content(question: Question, modality: str) -> list[dict[str, Any]]:
        if modality == "image":
            seen = {"type": "image", "image": image(question.row)}
            return [seen, {"type": "text", "text": question.text}]
        description = describe(digits[question.row], nth[question.row])
        return [{"type": "text", "text": f"{description} {question.text}"}]

    samples = [
        user_sample(
            f"digits/{split}/{number}/{modality}", content(question, modality), question.answer
        )
        for number, question in draw(list(enumerate(questions(digits))), limit, len(modalities))
        for modality in modalities
    ]
    return SampleList(samples[:limit], f"digits/{split}/{ask}")


def questions(digits: dict[int, int]) -> list[Question]:
    """Questions about the images of a split, in the order of the images.

    Each image is asked for its value once. Of parity, greater and less there are nearly as many
    questions each, and of every single text as many that are answered yes as no.

    Args:
        digits: The digit of each row.

    Example:
        >>> questions({0: 4, 1: 7})[0]
        Question(row=0, text='which digit is this?', answer='four')
    """
    rng = random.Random(0)
    asked = []
    for row, nth in _nth_of_its_digit(digits).items():
        # Wordings take turns within each digit, so that none favours a digit; once for each turn
        # of the descriptions, so that each meets each.
        text = VALUE[nth // len(DESCRIPTIONS) % len(VALUE)]
        asked.append(Question(row, text, NUMBERS[digits[row]]))
    for texts in _yes_or_no():
        times = len(digits) // (2 * len(texts))
        for text, true_of in texts.items():
            for answer in ("yes", "no"):
                fitting = [row for row, d in digits.items() if (d in true_of) == (answer == "yes")]
                chosen = rng.sample(fitting, times)
                asked += [Question(row, text, answer) for row in chosen]
    rng.shuffle(asked)
    return sorted(asked, key=lambda question: question.row)


def _nth_of_its_digit(digits: dict[int, int]) -> dict[int, int]:
    """How many images of the same digit come before each row."""
    before: Counter[int] = Counter()
    nth = {}
    for row, digit in digits.items():
        nth[row] = before[digit]
        before[digit] += 1
    return nth


def _yes_or_no() -> list[dict[str, set[int]]]:
    """For parity, greater and less: the texts, each with the digits that it is true of."""
    all_digits = range(10)
    parity = {
        text.format(what=what): {d for d in all_digits if d % 2 == rest}
        for text in PARITY
        for rest, what in enumerate(("even", "odd"))
    }
    greater = {
        text.format(what="greater", bound=NUMBERS[bound]): {d for d in all_digits if d > bound}
        for text in COMPARISON
        for bound in all_digits[:-1]
    }
    less = {
        text.format(what="less", bound=NUMBERS[bound]): {d for d in all_digits if d < bound}
        for text in COMPARISON
        for bound in all_digits[1:]
    }
    return [parity, greater, less]

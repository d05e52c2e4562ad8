"""The accuracy of VQA (Antol et al. 2015), with the normalisation of its official evaluation."""

from __future__ import annotations

import re
from collections.abc import Sequence

# What the official evaluation calls the fewest annotators that agree fully.
_AGREE = 3
# An answer that all give has to be able to reach 1 when one of them is left out.
_FEWEST = _AGREE + 1

_ARTICLES = {"a", "an", "the"}
_NUMBERS = "zero one two three four five six seven eight nine ten"
_DIGITS = {"none": "0"} | {word: str(number) for number, word in enumerate(_NUMBERS.split())}
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
_PERIOD = re.compile(r"\.(?!\d)")

# Written without an apostrophe these mean what they mean with it.
_PLAIN = """
    ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd
    how'll how's isn't it'd it'll ma'am mightn't might've mustn't must've needn't not've o'clock
    oughtn't shan't should've shouldn't somebody'll somebody's someone'd someone'll someone's
    something'd something'll that's there'd there're there's they'd they'll they're they've 'twas
    wasn't we've weren't what'll what're what's what've when's where'd where's where've who'd who'll
    who's who've why'll why're why's won't would've wouldn't y'all you'd you'll you're you've
"""
# Of two apostrophes either may be missing.
_DOUBLE = """
    couldn't've hadn't've he'd've it'd've mightn't've she'd've shouldn't've somebody'd've
    someone'd've something'd've there'd've they'd've we'd've who'd've wouldn't've y'all'll you'd've
"""
_CONTRACTIONS = {
    **{word.replace("'", ""): word for word in _PLAIN.split()},
    **{word.replace("'", "", 1): word for word in _DOUBLE.split()},
    **{"".join(word.rsplit("'", 1)): word for word in _DOUBLE.split()},
    **dict.fromkeys(("ow's'at", "'ows'at", "'ow'sat"), "'ow's'at"),
    **dict.fromkeys(("yall'd've", "y'alld've", "y'all'dve"), "y'all'd've"),
    "somebody'd": "somebodyd",  # so it is there
}


def normalised(text: str) -> str:
    """An answer as the official evaluation compares it.

    Lower case, without punctuation and articles, numbers up to ten in digits, apostrophes where
    contractions have them.

    Example:
        >>> normalised("The two cats, dont they?")
        "2 cats don't they"
    """
    text = text.replace("\n", " ").replace("\t", " ").strip()
    in_number = _COMMA_IN_NUMBER.search(text)
    cleaned = text
    for mark in _PUNCTUATION:
        apart = f"{mark} " in text or f" {mark}" in text
        cleaned = cleaned.replace(mark, "" if apart or in_number else " ")
    words = (_DIGITS.get(word, word) for word in _PERIOD.sub("", cleaned).lower().split())
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def vqa_accuracy(answers: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """Official VQA accuracy: an answer counts fully if three other annotators gave it.

    Of each annotator the answer is held against the others: min(1, how many of them gave it / 3),
    averaged over annotators (Antol et al. 2015, arXiv 1505.00468). Both sides are normalised, as on
    the evaluation server.

    Args:
        answers: `[sample]`, what the model said.
        references: `[sample]`, what each annotator said, ten in VQA; repetitions count.

    Returns:
        `[sample]`, each in [0, 1].

    Raises:
        ValueError: A sample has fewer than four answers, of which none could count fully.

    Example:
        >>> vqa_accuracy(["Two."], [["2", "two", "3", "3", "three", "4", "4", "4", "4", "4"]])
        [0.6]
    """
    return [_accuracy(a, given) for a, given in zip(answers, references, strict=True)]


def _accuracy(answer: str, given: Sequence[str]) -> float:
    if len(given) < _FEWEST:
        raise ValueError(
            f"VQA accuracy counts annotators who agree and needs at least {_FEWEST} answers of a "
            f"sample, not {list(given)}. For samples with a few accepted answers there are "
            "exact_match and containment."
        )
    said = normalised(answer)
    same = [normalised(one) == said for one in given]
    others = [sum(same) - one for one in same]
    return sum(min(1.0, count / _AGREE) for count in others) / len(given)

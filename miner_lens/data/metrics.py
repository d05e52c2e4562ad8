"""Metrics by name: how good an answer is, and when it counts as right.

A metric is a function of answers `[sample]` and of their references `[sample]`, each a list of
accepted answers, that returns a value for each sample. Data sets name theirs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial

import numpy as np

from miner_lens import installed
from miner_lens.data.captions import bleu, cider, sentence_similarity, tfidf_cosine
from miner_lens.data.option_letter import option_letter
from miner_lens.data.sample import Sample
from miner_lens.data.vqa_accuracy import vqa_accuracy

__all__ = [
    "METRICS",
    "anls",
    "bleu",
    "cider",
    "containment",
    "exact_match",
    "find",
    "measure",
    "multiple_choice",
    "sentence_similarity",
    "tfidf_cosine",
    "vqa_accuracy",
    "word_recognition_rate",
]

ENTRY_POINTS = "miner_lens.metrics"

Metric = Callable[[Sequence[str], Sequence[Sequence[str]]], Sequence[float]]
# Metrics by name, or names of known ones.
Metrics = Iterable[str] | Mapping[str, Metric]


def is_right(sample: Sample, answer: str) -> bool:
    """Whether an answer is one of the sample's accepted ones.

    Raises:
        ValueError: The sample has no accepted answer.
    """
    require_answers(sample)
    return answer.strip().lower() in {accepted.strip().lower() for accepted in sample.answers}


def require_answers(sample: Sample) -> None:
    """Refuse a sample that nobody can check.

    Raises:
        ValueError: The sample has no accepted answer.
    """
    if not sample.answers:
        raise ValueError(
            f"{sample.id or 'A sample'} has no answers to compare with. Give them as "
            "ml.Sample(messages, answers), or say which column holds them: "
            "ml.datasets.from_rows(rows, answers=...)."
        )


def exact_match(answers: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """1 where an answer is a reference, without regard to case and surrounding space, else 0.

    Example:
        >>> exact_match([" Blue", "dark blue"], [["blue"], ["blue"]])
        [1.0, 0.0]
    """
    return _of_each(lambda said, given: said == given, answers, references)


def containment(answers: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """1 where an answer contains a reference, without regard to case, else 0.

    As published by MINER for TextVQA and MSVD-QA. So "none" is right where "one" is.

    Example:
        >>> containment(["It is DARK BLUE.", "none", "red"], [["blue"], ["one"], ["blue"]])
        [1.0, 1.0, 0.0]
    """
    return _of_each(lambda said, given: given in said, answers, references)


def multiple_choice(
    answers: Sequence[str], references: Sequence[Sequence[str]], published: bool = False
) -> list[float]:
    """1 where an answer gives the letter of the right option, else 0.

    The letter is read as `miner_lens.data.option_letter` says: of "(B)", "The answer is B", "Option
    B" or "\\boxed{B}"; an answer with several letters, or with an option's text alone, gives none.

    Args:
        answers: `[sample]`, what the model said.
        references: `[sample]`, the right letters, case and brackets aside.
        published: As published by MINER, by the answer's first character alone; "Because" gives B.

    Example:
        >>> multiple_choice(["(b) a cat", "The answer is C.", "Because"], [["B"], ["C"], ["B"]])
        [1.0, 1.0, 0.0]
    """
    pairs = zip(answers, references, strict=True)
    if published:
        return [float(answer[:1] in given) for answer, given in pairs]
    return [
        float(option_letter(answer) in {one.strip(" ().").upper() for one in given})
        for answer, given in pairs
    ]


def word_recognition_rate(
    answers: Sequence[str], references: Sequence[Sequence[str]], published: bool = False
) -> list[float]:
    """1 - WER, the word error rate by jiwer, without regard to case: 1 at most, and it may be
    negative, where more is wrong than the reference has words.

    Args:
        answers: `[sample]`, transcriptions by the model.
        references: `[sample]`, right ones; of several the one that is nearest counts.
        published: With MINER's rule for prefixes: an answer that contains the reference, letter by
            letter, is fully right.

    Raises:
        ValueError: A reference has no words.
        ImportError: jiwer is missing.
    """
    try:
        import jiwer
    except ImportError as error:
        raise ImportError(
            "The word recognition rate needs jiwer: pip install 'miner-lens[metrics]'."
        ) from error

    def rate(said: str, given: str) -> float:
        if not given:
            raise ValueError("A reference has no words, so there is no rate of words recognised.")
        return 1.0 if published and given in said else 1 - float(jiwer.wer(given, said))

    return _of_each(rate, answers, references)


def anls(answers: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """Average normalised Levenshtein similarity (Biten et al. 2019, arXiv 1905.13648).

    1 - NL by the nearest reference, NL the edit distance by the greater length, without regard to
    case and repeated space; 0 where NL is 0.5 or more.

    Raises:
        ImportError: rapidfuzz is missing.
    """
    try:
        from rapidfuzz.distance import Levenshtein
    except ImportError as error:
        raise ImportError("ANLS needs rapidfuzz: pip install 'miner-lens[metrics]'.") from error

    def similarity(said: str, given: str) -> float:
        apart = Levenshtein.normalized_distance(" ".join(said.split()), " ".join(given.split()))
        return 1 - apart if apart < 0.5 else 0.0

    return _of_each(similarity, answers, references)


METRICS: dict[str, Metric] = {
    "exact_match": exact_match,
    "containment": containment,
    "vqa_accuracy": vqa_accuracy,
    "multiple_choice": multiple_choice,
    "multiple_choice_published": partial(multiple_choice, published=True),
    "bleu": bleu,
    "cider": cider,
    "tfidf_cosine": tfidf_cosine,
    "sentence_similarity": sentence_similarity,
    "word_recognition_rate": word_recognition_rate,
    "word_recognition_rate_published": partial(word_recognition_rate, published=True),
    "anls": anls,
}


def find(name: str) -> Metric:
    """A metric by its name: one of `METRICS`, or one that an installed package names.

    Such a package has, in the entry-point group `miner_lens.metrics`, functions of answers and
    references that return a value for each sample.

    Raises:
        ValueError: There is no metric of that name.

    Example:
        >>> find("containment") is containment
        True
    """
    otherwise = f", or pass it: metrics={{{name!r}: function}}"
    return installed.find("metric", name, METRICS, ENTRY_POINTS, otherwise)


def by_name(metrics: Metrics) -> dict[str, Metric]:
    """Metrics by name, of their names or as they are.

    Raises:
        ValueError: There is no metric of that name, or none is named.
    """
    if isinstance(metrics, str):
        metrics = [metrics]
    given = metrics if isinstance(metrics, Mapping) else {name: find(name) for name in metrics}
    if not given:
        raise ValueError("No metric is named; name one, such as metrics=['exact_match'].")
    return dict(given)


def measure(
    metrics: Metrics, answers: Sequence[str], references: Sequence[Sequence[str]]
) -> dict[str, np.ndarray]:
    """What each metric says of each answer.

    Args:
        metrics: Names, or functions by name.
        answers: `[sample]`, what the model said.
        references: `[sample]`, the accepted answers of each.

    Returns:
        `[sample]` of each metric, float64.

    Raises:
        ValueError: There is no such metric, a sample has no reference, the metric does not fit
            the references, or it does not return a finite value for each sample.
        ImportError: The package that a metric needs is missing.

    Example:
        >>> measure(["containment"], ["a blue one"], [["blue", "navy"]])
        {'containment': array([1.])}
    """
    if len(answers) != len(references):
        raise ValueError(f"There are {len(answers)} answers, but references of {len(references)}.")
    for number, given in enumerate(references):
        if isinstance(given, str) or not given:
            raise ValueError(f"References must be a list of strings, not {given!r} (row {number}).")
    found = {}
    for name, metric in by_name(metrics).items():
        try:
            values = np.asarray(metric(answers, references), dtype=float)
        except ValueError as error:
            raise ValueError(f"The metric {name!r} does not fit these samples: {error}") from error
        if values.shape != (len(answers),) or not np.isfinite(values).all():
            raise ValueError(
                f"The metric {name!r} must return a finite number for each of {len(answers)} "
                f"samples, not {values!r:.100}."
            )
        found[name] = values
    return found


def _of_each(
    compare: Callable[[str, str], float],
    answers: Sequence[str],
    references: Sequence[Sequence[str]],
) -> list[float]:
    """The best comparison of each answer with a reference, both in lower case."""
    return [
        float(max(compare(answer.strip().lower(), one.strip().lower()) for one in given))
        for answer, given in zip(answers, references, strict=True)
    ]

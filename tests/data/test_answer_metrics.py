"""Metrics of answers against hand-computed cases, their libraries, and properties."""

from __future__ import annotations

import sys
from importlib.metadata import EntryPoint
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from miner_lens import installed
from miner_lens.data import metrics
from miner_lens.data.vqa_accuracy import normalised

few = settings(max_examples=15, deadline=None)
word = st.text("abcdeé", min_size=2, max_size=6)  # shorter ones are none to tf-idf
sentence = st.lists(word, min_size=1, max_size=8).map(" ".join)
# Answers with one to three references each; sentences differ, or nothing would be rare.
cases = st.lists(
    st.tuples(sentence, st.lists(sentence, min_size=1, max_size=3)), min_size=1, max_size=4
)

RANGES = {
    "exact_match": (0, 1),
    "containment": (0, 1),
    "multiple_choice": (0, 1),
    "multiple_choice_published": (0, 1),
    "bleu": (0, 100),
    "cider": (0, 10),
    "tfidf_cosine": (0, 1),
    "word_recognition_rate": (-np.inf, 1),
    "word_recognition_rate_published": (-np.inf, 1),
    "anls": (0, 1),
}
CAPTIONS = [
    "a red cat sleeps on the mat",
    "two dogs run in the park",
    "a plane in the sky",
    "a plane",
]
REFERENCES = [
    ["a red cat is on a mat", "the cat sleeps on the red mat"],
    ["two dogs run in a park", "dogs running"],
    ["a plane flies in the blue sky", "a plane in the sky"],
    ["a plane a plane in the sky"],
]


def one(name: str, answer: str, *references: str) -> float:
    return float(metrics.measure([name], [answer], [references])[name][0])


@pytest.mark.parametrize("name", RANGES)
@few
@given(cases)
def test_values_are_in_range_and_the_same_each_time(name: str, given_: Any) -> None:
    answers, references = zip(*given_, strict=True)
    values = metrics.measure([name], answers, references)[name]
    low, high = RANGES[name]
    assert (values >= low).all()
    assert (values <= high + 1e-9).all()
    assert np.array_equal(values, metrics.measure([name], answers, references)[name])


@pytest.mark.parametrize("name", sorted(RANGES.keys() - {"cider", "bleu"}))
@few
@given(sentence)
def test_a_reference_itself_has_the_highest_value(name: str, text: str) -> None:
    text = "B" if name.startswith("multiple") else text
    assert one(name, text, text) == pytest.approx(RANGES[name][1], abs=1e-6)


@pytest.mark.parametrize("name", RANGES)
@few
@given(cases)
def test_an_empty_answer_has_the_lowest_value(name: str, given_: Any) -> None:
    references = [two for _, two in given_]
    values = metrics.measure([name], [""] * len(references), references)[name]
    assert (values == 0).all()


@few
@given(st.lists(word, min_size=4, max_size=9, unique=True).map(" ".join))
def test_captions_that_are_the_reference(text: str) -> None:
    assert one("bleu", text, text) == pytest.approx(100)
    other = "zz yy xx ww"
    assert metrics.cider([text, other], [[text], [other]]) == pytest.approx([10, 10])


def test_matching_of_strings() -> None:
    assert one("containment", "Blue and red", "green", "RED") == 1
    assert one("containment", "Blue", "dark blue") == 0
    assert one("exact_match", "NAVY\n", "blue", "navy") == 1
    assert one("exact_match", "dark blue", "blue") == 0


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("C", "C"),
        ("c.", "C"),
        ("(C) a dog", "C"),
        ("**C**: a dog", "C"),
        ("Answer: C", "C"),
        ("The correct answer is (C).", "C"),
        ("Cats", None),
        ("I see C", "C"),
        ("I think the answer is B.", "B"),
        ("The answer is **B**.", "B"),
        ("Option B", "B"),
        ("The correct answer is option (B)", "B"),
        (r"\boxed{B}", "B"),
        ("B and C", None),
        ("The answer is a dog", None),
        ("", None),
        ("42", None),
    ],
)
def test_letters_of_options(answer: str, letter: str | None) -> None:
    for option in "ABCDI":
        assert one("multiple_choice", answer, option) == (option == letter)
        assert one("multiple_choice", answer, f" ({option.lower()})") == (option == letter)
        assert one("multiple_choice_published", answer, option) == (answer[:1] == option)


# By the official script (VQA, PythonEvaluationTools, whose normalisation was also compared on
# 50,000 random strings).
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The Dog.", "dog"),
        ("two", "2"),
        ("none", "0"),
        ("dont", "don't"),
        ("shed've", "she'd've"),
        ("she'dve", "she'd've"),
        ("somebody'd", "somebodyd"),
        ("3,000 people", "3000 people"),
        ("black/white", "black white"),
        ("black, white", "black white"),
        ("1.5 m", "1.5 m"),
        ("5.", "5"),
        ("x-ray", "x ray"),
        ("10:30 a.m.", "10:30 am"),
        ("a\nb", "b"),
    ],
)
def test_normalisation_of_vqa(text: str, expected: str) -> None:
    assert normalised(text) == expected


@pytest.mark.parametrize(
    ("agree", "expected"), [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (10, 1)]
)
def test_accuracy_of_vqa(agree: int, expected: float) -> None:
    """Of 10 annotators n agree: n of them see n - 1 others, the rest see n."""
    references = ["Yes."] * agree + ["no"] * (10 - agree)
    assert one("vqa_accuracy", "yes", *references) == pytest.approx(expected)
    assert one("vqa_accuracy", "", *references) == 0


def test_vqa_accuracy_needs_annotators() -> None:
    with pytest.raises(ValueError, match=r"'vqa_accuracy' does not fit .* at least 4 answers"):
        one("vqa_accuracy", "yes", "yes", "yes")


def test_bleu_is_sacrebleus() -> None:
    sacrebleu = pytest.importorskip("sacrebleu")
    expected = [
        sacrebleu.sentence_bleu(a, r).score for a, r in zip(CAPTIONS, REFERENCES, strict=True)
    ]
    assert metrics.bleu(CAPTIONS, REFERENCES) == expected
    assert one("bleu", "the the the the", "the cat") < 20  # clipped


def test_cider_is_that_of_the_coco_evaluation() -> None:
    """By pycocoevalcap 1.2's CiderScorer; 300 random cases were equal to 1e-15."""
    expected = [4.34471789842665, 3.4486813658851028, 5.84163519319163, 2.59364986710717]
    assert metrics.cider(CAPTIONS, REFERENCES) == pytest.approx(expected, abs=1e-12)
    loud = [caption.upper() + "." for caption in CAPTIONS]
    assert metrics.cider(loud, REFERENCES) == metrics.cider(CAPTIONS, REFERENCES)
    assert metrics.cider(CAPTIONS[:1], REFERENCES[:1]) == [0]


def test_tfidf_cosine_by_hand() -> None:
    """Words of two texts: idf of a shared one 1, of another 1 + ln(3 / 2)."""
    rare = 1 + np.log(3 / 2)
    assert one("tfidf_cosine", "red cat", "red dog") == pytest.approx(1 / (1 + rare**2))
    both = one("tfidf_cosine", "red cat", "red cat", "blue dog")
    assert both == pytest.approx(0.5)  # the mean of 1 and 0


def test_word_recognition_is_one_minus_jiwers_rate() -> None:
    jiwer = pytest.importorskip("jiwer")
    said, given_ = "he hoped there would be", "HE HOPED THERE WOULD BE STEW FOR DINNER"
    assert one("word_recognition_rate", said, given_) == 1 - jiwer.wer(given_.lower(), said)
    assert one("word_recognition_rate", "x y z", "a") == -2
    prefixed = "The transcription is: he hoped"
    assert one("word_recognition_rate", prefixed, "HE HOPED") == -0.5
    assert one("word_recognition_rate_published", prefixed, "HE HOPED") == 1
    with pytest.raises(ValueError, match="no words"):
        one("word_recognition_rate", "a", " ")


@pytest.mark.parametrize(
    ("answer", "references", "expected"),
    [
        ("Coca  Cola", ["coca cola"], 1),
        ("coca colo", ["pepsi", "coca cola"], 8 / 9),
        ("abcd", ["abxy"], 0),  # NL is 0.5
        ("abcde", ["abcxy"], 0.6),
    ],
)
def test_anls_by_hand(answer: str, references: list[str], expected: float) -> None:
    assert one("anls", answer, *references) == pytest.approx(expected)


class Letters:
    """An encoder as sentence-transformers' are: unit vectors, here of how often letters occur."""

    def encode(self, texts: list[str], normalize_embeddings: bool, **_: Any) -> np.ndarray:
        assert normalize_embeddings
        counts = np.array([[text.count(letter) for letter in "abc"] for text in texts], float)
        return counts / np.linalg.norm(counts, axis=1, keepdims=True)


def test_sentence_similarity_by_hand() -> None:
    """Importing the library itself takes longer than all of these tests."""
    references = [["a", "b", "ab"], ["ccc"]]
    values = metrics.sentence_similarity(["aa", "c"], references, Letters())
    assert values == pytest.approx([(1 + 0 + 0.5**0.5) / 3, 1])


@pytest.mark.parametrize(
    ("name", "module", "package"),
    [
        ("bleu", "sacrebleu", "sacrebleu"),
        ("tfidf_cosine", "sklearn.feature_extraction.text", "scikit-learn"),
        ("sentence_similarity", "sentence_transformers", "sentence-transformers"),
        ("word_recognition_rate", "jiwer", "jiwer"),
        ("anls", "rapidfuzz.distance", "rapidfuzz"),
    ],
)
def test_a_missing_package_is_named(
    name: str, module: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf"{package}: pip install 'miner-lens\[metrics\]'"):
        one(name, "a cat", "a dog")


def length(answers: list[str], references: list[list[str]]) -> list[int]:
    return [len(answer) for answer in answers]


def total(answers: list[str], references: list[list[str]]) -> list[float]:
    return [float(len(answers))]


def test_metrics_of_other_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = EntryPoint("length", f"{__name__}:length", metrics.ENTRY_POINTS)
    monkeypatch.setattr(installed, "entry_points", lambda group: [entry])
    assert one("length", "four", "x") == 4
    with pytest.raises(ValueError, match=r"no metric 'lenght'; there are .*anls, length"):
        metrics.find("lenght")


def test_metrics_that_do_not_fit() -> None:
    found = metrics.measure({"own": length}, ["ab"], [["c"]])
    assert found["own"].tolist() == [2]
    with pytest.raises(ValueError, match=r"'total' must return a finite number for each of 2"):
        metrics.measure({"total": total}, ["a", "b"], [["a"], ["b"]])
    with pytest.raises(ValueError, match="must return a finite number"):
        metrics.measure({"nan": lambda a, r: [float("nan")]}, ["a"], [["a"]])
    with pytest.raises(ValueError, match=r"list of strings, not 'a' \(row 0\)"):
        metrics.measure(["exact_match"], ["a"], ["a"])
    with pytest.raises(ValueError, match=r"list of strings, not \[\] \(row 0\)"):
        metrics.measure(["exact_match"], ["a"], [[]])
    with pytest.raises(ValueError, match="2 answers, but references of 1"):
        metrics.measure(["exact_match"], ["a", "b"], [["a"]])
    with pytest.raises(ValueError, match="No metric is named"):
        metrics.measure([], ["a"], [["a"]])

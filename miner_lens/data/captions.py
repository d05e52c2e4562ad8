"""How like its references a caption is: BLEU, CIDEr-D, tf-idf cosine, sentence similarity."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

SENTENCE_MODEL = "sentence-transformers/paraphrase-MiniLM-L6-v2"
# Vedantam et al. 2015: n-grams up to four words, the penalty's width, the scale.
_LONGEST, _SIGMA, _SCALE = 4, 6.0, 10.0
_WORD = re.compile(r"[^\W_]+(?:-[^\W_]+)*|'[^\W_]+")

Weights = list[dict[tuple[str, ...], float]]


def bleu(answers: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """Sentence BLEU of each answer against all of its references, by sacrebleu, from 0 to 100.

    The mean over samples is not corpus BLEU, which sacrebleu computes of the same answers. (MINER's
    code has NLTK's, smoothed by method 1, against each reference apart.)

    Args:
        answers: `[sample]`, what the model said.
        references: `[sample]`, the accepted answers of each.

    Raises:
        ImportError: sacrebleu is missing.
    """
    try:
        import sacrebleu
    except ImportError as error:
        raise _missing("BLEU", "sacrebleu") from error
    pairs = zip(answers, references, strict=True)
    return [sacrebleu.sentence_bleu(answer, list(given)).score for answer, given in pairs]


def cider(answers: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """CIDEr-D of each answer, from 0 to 10 (Vedantam et al. 2015, arXiv 1411.5726).

    As in the COCO evaluation, but for its tokenizer, which needs Java: here words are lower case
    and without punctuation. N-grams count by how rare they are among the references given, so that
    values of different sets of samples do not compare, and of a single sample the value is 0.

    Args:
        answers: `[sample]`, what the model said.
        references: `[sample]`, the accepted answers of each.

    Example:
        >>> [round(value, 3) for value in cider(
        ...     ["a red cat on a mat", "a dog"], [["a red cat on a mat"], ["two birds in a tree"]]
        ... )]
        [10.0, 0.0]
    """
    counted = [[_ngrams(one) for one in given] for given in references]
    occurs = Counter(gram for given in counted for gram in set().union(*given))
    samples = math.log(max(1, len(counted)))

    def weighted(grams: Counter[tuple[str, ...]]) -> Weights:
        weights: Weights = [{} for _ in range(_LONGEST)]
        for gram, count in grams.items():
            weights[len(gram) - 1][gram] = count * (samples - math.log(max(1, occurs[gram])))
        return weights

    def similarity(said: Counter[tuple[str, ...]], given: Counter[tuple[str, ...]]) -> float:
        # The reference implementation takes the number of pairs of words for the length.
        apart = _pairs(said) - _pairs(given)
        penalty = math.exp(-(apart**2) / (2 * _SIGMA**2))
        terms = zip(weighted(said), weighted(given), strict=True)
        return penalty * sum(_clipped_cosine(one, other) for one, other in terms) / _LONGEST

    found = []
    for answer, given in zip(answers, counted, strict=True):
        said = _ngrams(answer)
        found.append(_SCALE * sum(similarity(said, one) for one in given) / len(given))
    return found


def tfidf_cosine(answers: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """The cosine of tf-idf vectors, averaged over references, from 0 to 1.

    What MINER's published code calls CIDEr: of each sample by itself, scikit-learn's vectors are
    fitted to its references and the answer, in words of two letters and more. (The code also
    reports the least and the greatest.)

    Args:
        answers: `[sample]`, what the model said.
        references: `[sample]`, the accepted answers of each.

    Raises:
        ImportError: scikit-learn is missing.
    """
    try:
        from sklearn.feature_extraction.text import TfidfVectorizer
    except ImportError as error:
        raise _missing("The tf-idf cosine", "scikit-learn") from error
    found = []
    for answer, given in zip(answers, references, strict=True):
        vectorizer: Any = TfidfVectorizer()
        texts = [*given, answer]
        if not any(map(vectorizer.build_analyzer(), texts)):  # no words, no vectors
            found.append(0.0)
            continue
        vectors = vectorizer.fit_transform(texts)  # of unit length
        found.append(float((vectors[:-1] @ vectors[-1].T).mean()))
    return found


def sentence_similarity(
    answers: Sequence[str], references: Sequence[Sequence[str]], model: Any = SENTENCE_MODEL
) -> list[float]:
    """The cosine of sentence embeddings, averaged over references, from -1 to 1.

    As published by MINER, with the same model, which sentence-transformers gets from the Hugging
    Face hub unless it is in the cache.

    Args:
        answers: `[sample]`, what the model said.
        references: `[sample]`, the accepted answers of each.
        model: A hub id, a folder, or a `SentenceTransformer`.

    Raises:
        ImportError: sentence-transformers is missing.
        OSError: The model is neither in the cache nor to be had.
    """
    encoder = _encoder(str(model)) if isinstance(model, str | Path) else model
    texts = [*answers, *(one for given in references for one in given)]
    vectors = encoder.encode(texts, normalize_embeddings=True, show_progress_bar=False)
    found, place = [], len(answers)
    for vector, given in zip(vectors, references, strict=False):
        found.append(float((vectors[place : place + len(given)] @ vector).mean()))
        place += len(given)
    return found


def _encoder(model: str) -> Any:
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise _missing("Sentence similarity", "sentence-transformers") from error
    return SentenceTransformer(model)


def _ngrams(text: str) -> Counter[tuple[str, ...]]:
    words = _WORD.findall(text.lower())
    return Counter(
        tuple(words[start : start + size])
        for size in range(1, _LONGEST + 1)
        for start in range(len(words) - size + 1)
    )


def _pairs(grams: Counter[tuple[str, ...]]) -> int:
    return sum(count for gram, count in grams.items() if len(gram) == 2)


def _clipped_cosine(
    said: dict[tuple[str, ...], float], given: dict[tuple[str, ...], float]
) -> float:
    """In which an n-gram said too often counts as often as the reference has it."""
    length = _length(said.values()) * _length(given.values())
    shared = sum(min(weight, given.get(g, 0.0)) * given.get(g, 0.0) for g, weight in said.items())
    return shared / length if length else 0.0


def _length(weights: Iterable[float]) -> float:
    return math.sqrt(sum(weight**2 for weight in weights))


def _missing(what: str, package: str) -> ImportError:
    return ImportError(f"{what} needs {package}: pip install 'miner-lens[metrics]'.")

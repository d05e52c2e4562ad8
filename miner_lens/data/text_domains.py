"""Text domains: prompts with held-out continuations, from what every installation has."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from itertools import chain, zip_longest

from miner_lens.data import documents
from miner_lens.data.documents import Document, in_test
from miner_lens.data.sample import Sample
from miner_lens.data.sample_list import SampleList, draw

_DOCUMENTS: dict[str, Callable[[], Iterator[Document]]] = {
    "code": documents.code,
    "prose": documents.prose,
    "licences": documents.licences,
    "arithmetic": documents.arithmetic,
}
DOMAINS = tuple(_DOCUMENTS)
ASKS = {"all": DOMAINS, **{domain: (domain,) for domain in DOMAINS}}

# Characters of a prompt, of a continuation, and of both.
PROMPT = (200, 1000)
CONTINUATION = (40, 300)
PASSAGE = (280, 1200)
SAMPLES = {"train": 320, "test": 80}  # of each domain, at most
PER_DOCUMENT = 16  # so that no file is a domain of its own
# A cut before a single space is between two tokens for every byte-level tokenizer, so that prompt
# and continuation, tokenized apart, are the tokens of the whole.
CUT = re.compile(r"(?<=\S) (?=\S)")
RESULT = re.compile(r"(?: is| =)(?= )")


def load(split: str, ask: str, limit: int | None) -> SampleList:
    """Make prompts with continuations; see `miner_lens.data.datasets.load`.

    Raises:
        FileNotFoundError: This Python comes without the source of its standard library.
    """
    domains = ASKS[ask]
    parts = []
    for place, domain in enumerate(domains):
        share = None if limit is None else (limit + len(domains) - 1 - place) // len(domains)
        parts.append(draw(_domain(domain)[split], share, 1))
    alternating = chain.from_iterable(zip_longest(*parts))
    return SampleList(
        (sample for sample in alternating if sample is not None), f"text-domains/{split}/{ask}"
    )


@cache
def _domain(domain: str) -> dict[str, list[Sample]]:
    """Samples by split."""
    found: dict[str, list[Sample]] = {"train": [], "test": []}
    known: set[str] = set()
    for document in _DOCUMENTS[domain]():
        split = "test" if in_test(document.name) else "train"
        pairs = [
            pair
            for section in document.sections
            for passage in passages(_paragraphs(section, domain), known)
            if (pair := cut(passage, domain))
        ]
        chosen = random.Random(document.name).sample(
            range(len(pairs)), min(PER_DOCUMENT, len(pairs))
        )
        for number in sorted(chosen):
            prompt, continuation = pairs[number]
            found[split].append(
                Sample(
                    [{"role": "user", "content": prompt}],
                    (continuation,),
                    f"text-domains/{split}/{domain}/{document.name}/{number}",
                    domain,
                )
            )
    return {split: draw(samples, SAMPLES[split], 1) for split, samples in found.items()}


def passages(paragraphs: Iterable[str], known: set[str]) -> Iterator[str]:
    """Paragraphs that follow one another, joined to texts of bounded length.

    Args:
        paragraphs: The paragraphs; an empty one separates those before it from those after.
        known: Letters of long paragraphs that have been seen, which are left out from now on.
    """
    run = ""
    for paragraph in chain(paragraphs, [""]):
        letters = re.sub(r"[\W\d_]+", "", paragraph).lower()
        is_new = bool(paragraph) and len(paragraph) <= PASSAGE[1] and letters not in known
        if len(letters) >= CONTINUATION[0]:
            known.add(letters)
        longer = f"{run}\n\n{paragraph}" if run else paragraph
        if is_new and len(longer) <= PASSAGE[1]:
            run = longer
            continue
        if len(run) >= PASSAGE[0]:
            yield run
        run = paragraph if is_new else ""


def cut(passage: str, domain: str) -> tuple[str, str] | None:
    """A prompt and its continuation, which begins with a space; None where no cut fits.

    A quarter of the text is held out; of arithmetic, the last result.
    """
    if domain == "arithmetic":
        result = list(RESULT.finditer(passage))[-1]
        return passage[: result.end()], passage[result.end() :]
    target = len(passage) - min(len(passage) // 4, CONTINUATION[1])
    for place in CUT.finditer(passage, target):
        prompt, continuation = passage[: place.start()], passage[place.start() :]
        if PROMPT[0] <= len(prompt) <= PROMPT[1] and len(continuation) >= CONTINUATION[0]:
            return prompt, continuation
    return None


def _paragraphs(text: str, domain: str) -> Iterator[str]:
    """The paragraphs of a text; of prose, empty ones in place of those that are none."""
    for block in re.split(r"\n(?:[ \t\f]*\n)+", text.expandtabs(8).strip("\n")):
        paragraph = "\n".join(line.rstrip() for line in block.splitlines())
        yield paragraph if domain != "prose" or _is_prose(paragraph) else ""


def _is_prose(paragraph: str) -> bool:
    """Whether it is made of words, flush left, without examples or tables."""
    words = re.findall(r"(?<!\S)[(\"'`*]*[A-Za-z][a-z'-]*[)\"'`*.,:;?!]*(?!\S)", paragraph)
    return (
        not paragraph.startswith((" ", ">>>", "-", "*", "="))
        and len(words) >= 8
        and len(words) >= 0.8 * len(paragraph.split())
        and ">>>" not in paragraph
        and "   " not in paragraph
    )

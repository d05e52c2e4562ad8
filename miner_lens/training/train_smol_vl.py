"""Train the organism `smol-vl`: `python -m miner_lens.training.train_smol_vl [--out DIR]`."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import easy_vqa
import torch
from torch import Tensor

from miner_lens.data import digits
from miner_lens.data.datasets import COLOURS, DESCRIPTIONS, SHAPES, describe
from miner_lens.organisms import assembly, smollm2
from miner_lens.training import language, smol_card
from miner_lens.training.smol import (
    Asked,
    Step,
    add_factors,
    answer_loss,
    factors_of,
    image_rope,
    language_loss,
    learn,
    pack,
)
from miner_lens.training.smol_exam import OPENING, TURN, VISION, measured
from miner_lens.training.smol_vl_tower import (
    TOKENS,
    TOWER,
    Digits,
    begin_with_shapes,
    features,
    train_tower,
)
from miner_lens.training.train_shapes import Pictures, Questions

# Stages, their steps and highest learning rates. Handwriting is hardest to read, and to compare:
# these have stages.
TOWER_STEPS, STEPS, READING_STEPS = 1600, 900, 350
COMPARING_STEPS = {"comparing": 300, "comparing-again": 250}
PEAK, READING_PEAK = 3e-3, 2e-3  # of all later stages, too
QUESTIONS = 4  # about each scene
KEPT = 1  # rows of plain text or instructions in every second step
KEEPING = 2.0  # weight of the language that is to be kept
# Between these steps the share of turned questions (negated, odd, less) rises from none to a half.
# Yes or no is an exclusive or among them: learnt after what is asked, it comes quickly, and
# together with it not at all.
RAMP = (200, 450)
# Kinds of questions about a digit, and how often each is asked: comparing is hardest to learn.
KINDS = ("value", "parity", "comparison")
OFTEN, OFTEN_COMPARED = (1, 2, 3), (1, 1, 4)
# The scenes of a step: how each is told, and of which data set.
Scenes = tuple[tuple[str, str], ...]
SCENES: Scenes = (
    *[("image", "easy-vqa")] * 2,
    *[("image", "digits")] * 2,
    *[("text", "easy-vqa")] * 2,
    *[("text", "digits")] * 2,
)
READING: Scenes = (
    ("image", "easy-vqa"),
    *[("image", "digits")] * 5,
    ("text", "easy-vqa"),
    ("text", "digits"),
)
COMPARING: Scenes = (("image", "easy-vqa"), *[("image", "digits")] * 6, ("text", "digits"))
ASKED = [(data, ask) for data in ("easy-vqa", "digits") for ask in ("image", "text")]
IMAGE = VISION.format("<|image_pad|>" * TOKENS)


def ask_digit(
    digit: int, turned: float, rng: random.Random, often: Sequence[int] = OFTEN
) -> tuple[str, str]:
    """A question about a digit and its answer; yes and no are as likely.

    Args:
        digit: The digit.
        turned: How often to ask for odd instead of even, and for less instead of greater.
        rng: Draws the question.
        often: How often each of KINDS is asked.
    """
    kind = rng.choices(KINDS, often)[0]
    if kind == "value":
        return rng.choice(digits.VALUE), digits.NUMBERS[digit]
    other, truth = rng.random() < turned, rng.random() < 0.5
    if kind == "parity":
        text = rng.choice(digits.PARITY).format(what="odd" if other else "even")
        return text, "yes" if digit % 2 == other else "no"
    bounds = range(1, 10) if other else range(9)
    fitting = [b for b in bounds if (digit < b if other else digit > b) == truth]
    if not fitting:  # nothing is less than zero
        return ask_digit(digit, turned, rng, often)
    what, bound = "less" if other else "greater", digits.NUMBERS[rng.choice(fitting)]
    text = rng.choice(digits.COMPARISON).format(what=what, bound=bound)
    return text, "yes" if truth else "no"


class Lessons:
    """Draws scenes with questions, as packed rows with their embeddings."""

    def __init__(self, model: Any, tokenizer: Any, pictures: Pictures) -> None:
        forms, _, _ = easy_vqa.get_train_questions()
        self.model, self.tokenizer, self.pictures = model, tokenizer, pictures
        self.questions = Questions(forms)
        self.digits = Digits(range(digits.FIRST_TEST_ROW), pictures)
        self.seen = tokenizer(OPENING + IMAGE).input_ids
        self.rope = image_rope(model, self.seen)

    def draw(
        self, scenes: Scenes, step: Step, turned: float, often: Sequence[int]
    ) -> tuple[Any, Tensor]:
        """The packed questions of a step, a share of them turned, and their embeddings."""
        rng, colours = step.rng, tuple(COLOURS)
        n_shapes, n_digits = (scenes.count(("image", data)) for data in ("easy-vqa", "digits"))
        pictures = self.pictures.draw(n_shapes, step.generator)
        values, written = self.digits.draw(n_digits, step.generator)
        shown = list(zip(pictures.shapes.tolist(), pictures.colours.tolist(), strict=True))
        digit_rows = values.tolist()
        rows = []
        for told, data in scenes:
            if data == "easy-vqa":
                shape, colour = rng.randrange(len(SHAPES)), rng.randrange(len(colours))
                if told == "image":
                    shape, colour = shown.pop(0)
                pair = SHAPES[shape], colours[colour]
                told_as = describe(*pair, rng.randrange(len(DESCRIPTIONS)))
                asked = [self.questions.draw(*pair, turned, rng) for _ in range(QUESTIONS)]
            else:
                digit = digit_rows.pop(0) if told == "image" else rng.randrange(10)
                told_as = digits.describe(digit, rng.randrange(len(digits.DESCRIPTIONS)))
                asked = [ask_digit(digit, turned, rng, often) for _ in range(QUESTIONS)]
            rows.append(self._row(told, told_as, asked))
        packed = pack(rows, self.tokenizer.pad_token_id, axes=3)
        embeds = self.model.get_input_embeddings()(packed.ids)
        tokens = features(self.model, torch.cat([pictures.patches, written]))
        is_image = packed.ids == self.model.config.image_token_id
        return packed, embeds.masked_scatter(is_image[..., None], tokens)

    def _row(self, told: str, description: str, asked: Sequence[tuple[str, str]]) -> Asked:
        space = "" if told == "image" else " "
        branches = [
            (
                self.tokenizer(f"{space}{question}{TURN}").input_ids,
                self.tokenizer(f"{answer}<|im_end|>").input_ids,
            )
            for question, answer in asked
        ]
        if told == "image":
            return Asked(self.seen, branches, self.rope)
        return Asked(self.tokenizer(OPENING + description).input_ids, branches)


def train_decoder(
    model: Any, tokenizer: Any, lessons: Lessons, texts: language.Texts, folder: Path, seed: int
) -> None:
    """Teach merger and attention to answer, and to speak as SmolLM2 does."""
    parameters = add_factors(model)
    merger = model.model.visual.merger.requires_grad_(True)
    parameters |= {f"merger.{name}": p for name, p in merger.named_parameters()}

    def lesson(
        scenes: Scenes, step: Step, turned: float, often: Sequence[int] = OFTEN
    ) -> tuple[Tensor, dict[str, float]]:
        loss, right = answer_loss(model, *lessons.draw(scenes, step, turned, often))
        figures = {"answers": loss.item(), "tokens right": right.float().mean().item()}
        if step.number % 2 == 0:
            kept = language_loss(model, texts.draw(KEPT, step.rng))
            loss = loss + KEEPING * kept
            figures["kept"] = kept.item()
        return loss, figures

    def answering(step: Step) -> tuple[Tensor, dict[str, float]]:
        start, end = RAMP
        turned = 0.5 * min(1.0, max(0.0, (step.number - start) / (end - start)))
        return lesson(SCENES, step, turned)

    def reading(step: Step) -> tuple[Tensor, dict[str, float]]:
        return lesson(READING, step, 0.5)

    def comparing(step: Step) -> tuple[Tensor, dict[str, float]]:
        return lesson(COMPARING, step, 0.5, OFTEN_COMPARED)

    learn("decoder", folder, parameters, answering, STEPS, PEAK, seed)
    learn("reading", folder, parameters, reading, READING_STEPS, READING_PEAK, seed)
    for stage, steps in COMPARING_STEPS.items():
        learn(stage, folder, parameters, comparing, steps, READING_PEAK, seed)
    model.requires_grad_(False)


def train(out: Path, work: Path, seed: int) -> None:
    """Train, and write the delta."""
    torch.manual_seed(seed)
    decoder, tokenizer = smollm2.decoder(), smollm2.tokenizer(media=True)
    told = language.instructions("train", decoder, tokenizer, work)
    torch.manual_seed(seed)
    model = smollm2.qwen2_vl(decoder, TOWER)
    processor = smollm2.vision_processor(TOWER)
    begin_with_shapes(model)
    paths = [path for _, path in sorted(easy_vqa.get_train_image_paths().items())]
    pictures = Pictures(paths, processor)
    train_tower(model, pictures, work, seed, TOWER_STEPS)
    lessons = Lessons(model, tokenizer, pictures)
    texts = language.Texts(tokenizer, told)
    train_decoder(model, tokenizer, lessons, texts, work, seed)
    assembly.write(out, model, processor, factors_of(model), 1.0, torch.bfloat16)


def describe_organism(out: Path, work: Path, seed: int) -> None:
    """Assemble and measure it, and write its card."""
    recipe = {
        "every": "every second",
        "keeping": KEEPING,
        "tower_steps": f"{TOWER_STEPS:,}",
        "steps": STEPS,
        "questions": QUESTIONS * len(SCENES),
        "peak": PEAK,
        "reading_steps": READING_STEPS,
        "reading_peak": READING_PEAK,
        "comparing_steps": " and ".join(map(str, COMPARING_STEPS.values())),
        "seed": seed,
    }
    parts = (
        smol_card.VL_TAUGHT,
        smol_card.VL_COMMANDS,
        smol_card.VL_STAGES,
        smol_card.VL_LIMITS,
    )
    card = smol_card.card(out, smol_card.VL, parts, lambda at: measured(at, ASKED), recipe, work)
    (out / "README.md").write_text(card)


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, write, assemble and measure."""
    smol_card.command("smol-vl", train, describe_organism, arguments)


if __name__ == "__main__":
    main()

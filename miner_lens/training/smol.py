"""How the organisms around SmolLM2 are taught: packed questions, low-rank factors, its language."""

from __future__ import annotations

import inspect
import random
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div

from miner_lens import files
from miner_lens.organisms.assembly import PROJECTIONS
from miner_lens.training.training import descend, log, schedule

RANK = 8
SAVED_EVERY = 25
IGNORED = -100


class Asked(NamedTuple):
    """What questions are about, then the questions, each with its answer, as token ids.

    Attributes:
        about: The beginning of the user's turn: an image, a sound, a description.
        branches: The rest of the turn, and the answer with the end of its turn, of each question.
        rope: Positions of `about` for rotary embeddings, [axis, pos]; None: 0, 1, 2, ...
    """

    about: list[int]
    branches: list[tuple[list[int], list[int]]]
    rope: Tensor | None = None


class Packed(NamedTuple):
    """Rows in which several questions follow what they are about, none seeing another.

    So an image is read once for all of its questions, and yet each is answered as if it were
    alone. The labels are of the token that comes next, and -100 where none is scored.
    """

    ids: Tensor  # [row, pos]
    labels: Tensor  # [row, pos]
    rope: Tensor  # [axis, row, pos]
    sees: Tensor  # [row, 1, pos, pos]: whether the one position sees the other


def pack(rows: Sequence[Asked], pad: int, axes: int) -> Packed:
    """Rows of questions, padded on the right.

    Args:
        rows: The questions.
        pad: The padding token.
        axes: How many axes rotary positions have: 3 in Qwen2-VL, 1 elsewhere.
    """
    width = max(len(row.about) + sum(len(a) + len(r) for a, r in row.branches) for row in rows)
    ids = torch.full((len(rows), width), pad)
    labels = torch.full((len(rows), width), IGNORED)
    rope = torch.zeros(axes, len(rows), width, dtype=torch.long)
    branch = torch.full((len(rows), width), -1)
    for n, row in enumerate(rows):
        end = len(row.about)
        ids[n, :end] = torch.tensor(row.about)
        rope[:, n, :end] = torch.arange(end) if row.rope is None else row.rope
        branch[n, :end] = 0
        first = int(rope[:, n, :end].max()) + 1
        for number, (ask, reply) in enumerate(row.branches, 1):
            start, answer, end = end, end + len(ask), end + len(ask) + len(reply)
            ids[n, start:end] = torch.tensor(ask + reply)
            labels[n, answer - 1 : end - 1] = torch.tensor(reply)
            rope[:, n, start:end] = first + torch.arange(end - start)
            branch[n, start:end] = number
    same = (branch[:, :, None] == branch[:, None]) | (branch[:, None] == 0)
    return Packed(ids, labels, rope, (same & torch.ones(width, width).tril().bool())[:, None])


def image_rope(model: Any, ids: Sequence[int]) -> Tensor | None:
    """Rotary positions of a prompt with one square image, [axis, pos]; None: it has no image.

    Args:
        model: A Qwen2-VL or a Qwen2.5-Omni.
        ids: The prompt.
    """
    rows = torch.tensor([list(ids)])
    is_image = rows == model.config.image_token_id
    count = int(is_image.sum())
    if not count:
        return None
    side = round(count**0.5) * model.config.vision_config.spatial_merge_size
    wanted = inspect.signature(model.model.get_rope_index).parameters
    given = {"input_ids": rows, "image_grid_thw": torch.tensor([[1, side, side]])}
    given |= {"mm_token_type_ids": is_image.int(), "attention_mask": torch.ones_like(rows)}
    rope, _ = model.model.get_rope_index(**{n: v for n, v in given.items() if n in wanted})
    positions: Tensor = rope[:, 0]
    return positions


def answer_loss(model: Any, packed: Packed, embeds: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy of the answers, and of each scored token whether it is the likeliest.

    Args:
        model: A Qwen2-VL, a Qwen2-Audio or a Qwen2.5-Omni.
        packed: The questions.
        embeds: Their embeddings, media included, [row, pos, hidden].
    """
    positions = packed.rope if len(packed.rope) > 1 else packed.rope[0]
    hidden = model.model.language_model(
        inputs_embeds=embeds,
        position_ids=positions,
        attention_mask=packed.sees,
        use_cache=False,
    ).last_hidden_state
    scored = packed.labels != IGNORED
    logits, labels = model.lm_head(hidden[scored]), packed.labels[scored]
    return cross_entropy(logits, labels), logits.argmax(-1) == labels


def add_factors(model: Any, rank: int = RANK) -> dict[str, nn.Parameter]:
    """Give the decoder's attention low-rank factors to learn, and freeze all the rest.

    Returns:
        The factors by name.
    """
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=list(PROJECTIONS))
    model.requires_grad_(False)
    language = model.model.language_model
    inject_adapter_in_model(config, language)
    return {name: p for name, p in language.named_parameters() if "lora_" in name}


def factors_of(model: Any) -> dict[str, tuple[Tensor, Tensor]]:
    """The factors that a decoder has learnt, as `organisms.assembly` takes them."""
    state = dict(model.model.language_model.named_parameters())
    ending = ".lora_A.default.weight"
    return {
        name.removesuffix(ending): (a.data, state[name.replace(".lora_A.", ".lora_B.")].data)
        for name, a in state.items()
        if name.endswith(ending)
    }


def set_factors(model: Any, factors: Mapping[str, tuple[Tensor, Tensor]]) -> None:
    """Give a decoder that has factors those that another has learnt."""
    state = dict(model.model.language_model.named_parameters())
    for name, pair in factors.items():
        for letter, factor in zip("AB", pair, strict=True):
            state[f"{name}.lora_{letter}.default.weight"].data.copy_(factor)


@contextmanager
def without_factors(model: Any) -> Iterator[None]:
    """SmolLM2 as it was, within."""
    layers: list[Any] = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    learning = [p for layer in layers for p in layer.parameters() if p.requires_grad]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
        for parameter in learning:
            parameter.requires_grad_(True)


def language_loss(model: Any, ids: Tensor) -> Tensor:
    """How far the model's distribution of the next token is from SmolLM2's: KL, in nats a token.

    Args:
        model: A model whose decoder has factors.
        ids: Texts without padding, [row, pos].
    """
    language, head = model.model.language_model, model.lm_head
    embeds = model.get_input_embeddings()(ids)
    with torch.no_grad(), without_factors(model):
        hidden = language(inputs_embeds=embeds, use_cache=False).last_hidden_state
        told = head(hidden[:, :-1]).flatten(0, 1).log_softmax(-1)
    hidden = language(inputs_embeds=embeds, use_cache=False).last_hidden_state
    said = head(hidden[:, :-1]).flatten(0, 1).log_softmax(-1)
    return kl_div(said, told, log_target=True, reduction="batchmean")


class Step(NamedTuple):
    """Randomness of one step, which depends on nothing but its place."""

    number: int
    rng: random.Random
    generator: torch.Generator

    @classmethod
    def of(cls, stage: str, seed: int, number: int) -> Step:
        """The step of that number."""
        name = f"{stage} {seed} {number}"
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        return cls(number, random.Random(name), generator)


def learn(
    stage: str,
    folder: Path,
    parameters: Mapping[str, nn.Parameter],
    lesson: Callable[[Step], tuple[Tensor, dict[str, float]]],
    steps: int,
    peak: float,
    seed: int,
    warmup: int = 30,
    weight_decay: float = 0.01,
) -> None:
    """Train parameters, resuming where an earlier call was broken off.

    What is learnt goes to `<folder>/<stage>.safetensors` every SAVED_EVERY steps; a stage
    that is done already is only read. A resumed stage gives what an unbroken one does.

    Args:
        stage: What the stage is called.
        folder: Where its state is kept.
        parameters: What is trained, by name.
        lesson: Gives the loss of a step and figures to print.
        steps: How many steps.
        peak: The highest learning rate.
        seed: The seed.
        warmup: Steps in which the learning rate rises.
        weight_decay: AdamW's.

    Raises:
        ValueError: The file there is of another recipe.
    """
    file, kind = folder / f"{stage}.safetensors", "TrainingStage"
    recipe = {"stage": stage, "steps": steps, "peak": peak, "seed": seed}
    optimizer = torch.optim.AdamW(
        list(parameters.values()), weight_decay=weight_decay, betas=(0.9, 0.98)
    )
    done = 0
    if file.exists():
        tensors, saved = files.read(file, kind)
        if saved["recipe"] != recipe:
            raise ValueError(f"{file} is of {saved['recipe']}; expected {recipe}. Remove it.")
        done = saved["done"]
        _restore(parameters, optimizer, tensors, done)
    start, figures = time.time(), dict[str, list[float]]()
    for number, rate in enumerate(schedule(steps, peak, warmup)):
        if number < done:
            continue
        loss, seen = lesson(Step.of(stage, seed, number))
        descend(optimizer, loss, rate)
        for name, value in {"loss": loss.item(), **seen}.items():
            figures.setdefault(name, []).append(value)
        if (number + 1) % SAVED_EVERY == 0 or number + 1 == steps:
            state = _state(parameters, optimizer)
            files.write(file, kind, state, {"recipe": recipe, "done": number + 1})
            means = " ".join(f"{k} {sum(v) / len(v):.3f}" for k, v in sorted(figures.items()))
            log(start, f"{stage} {number + 1}: {means}")
            figures.clear()


def _state(
    parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer
) -> dict[str, Tensor]:
    state = {f"value {name}": parameter.data for name, parameter in parameters.items()}
    for name, parameter in parameters.items():
        for key in ("exp_avg", "exp_avg_sq"):
            state[f"{key} {name}"] = optimizer.state[parameter][key]
    return state


def _restore(
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    state: Mapping[str, Tensor],
    done: int,
) -> None:
    for name, parameter in parameters.items():
        parameter.data.copy_(state[f"value {name}"])
        moments = {key: state[f"{key} {name}"] for key in ("exp_avg", "exp_avg_sq")}
        optimizer.state[parameter] = {"step": torch.tensor(float(done)), **moments}

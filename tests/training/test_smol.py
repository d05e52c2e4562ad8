"""How the organisms around SmolLM2 are taught, on a decoder of a few neurons."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import miner_lens as ml
from miner_lens.data import digits
from miner_lens.organisms import assembly, smollm2
from miner_lens.training import smol
from miner_lens.training.smol import Asked, Step, add_factors, answer_loss, language_loss, pack
from miner_lens.training.smol_exam import which_are_right
from miner_lens.training.smol_vl_tower import TOWER
from miner_lens.training.train_smol_vl import ask_digit


@pytest.fixture
def model() -> Any:
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
        initializer_range=0.2,
        tie_word_embeddings=True,
    )
    return smollm2.qwen2_vl(LlamaForCausalLM(config).eval(), TOWER)


def drawn(rng: random.Random, questions: int, rope: bool) -> Asked:
    def ids(low: int, high: int) -> list[int]:
        return [rng.randrange(20, 64) for _ in range(rng.randint(low, high))]

    about = ids(1, 9)
    # An image's positions are fewer than its tokens.
    positions = torch.arange(len(about)).clamp(max=4).expand(3, -1) if rope else None
    return Asked(about, [(ids(1, 6), ids(1, 3)) for _ in range(questions)], positions)


def test_packed_questions_are_answered_as_if_alone(model: Any) -> None:
    rng = random.Random(0)
    rows = [drawn(rng, questions, rope) for questions in (1, 3, 4) for rope in (False, True)]

    def loss(rows: list[Asked]) -> tuple[Tensor, Tensor]:
        packed = pack(rows, 0, axes=3)
        return answer_loss(model, packed, model.get_input_embeddings()(packed.ids))

    with torch.no_grad():
        together, right = loss(rows)
        alone = [
            (loss([row._replace(branches=[branch])]), len(branch[1]))
            for row in rows
            for branch in row.branches
        ]
    tokens = sum(length for _, length in alone)
    mean = sum(one * length for (one, _), length in alone) / tokens
    assert together.item() == pytest.approx(float(mean), abs=1e-5)
    assert right.tolist() == torch.cat([hits for (_, hits), _ in alone]).tolist()


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 10_000), questions=st.integers(1, 4))
def test_what_is_scored_and_seen(seed: int, questions: int) -> None:
    rng = random.Random(seed)
    rows = [drawn(rng, questions, rope=False) for _ in range(3)]
    packed = pack(rows, 0, axes=1)
    replies = [token for row in rows for _, reply in row.branches for token in reply]
    assert packed.labels[packed.labels != smol.IGNORED].tolist() == replies
    for n, row in enumerate(rows):
        start = len(row.about)
        for ask, reply in row.branches:
            last = start + len(ask) + len(reply) - 1
            seen = packed.ids[n][packed.sees[n, 0, last]].tolist()
            assert seen == row.about + ask + reply
            start = last + 1


def test_factors_begin_with_nothing_and_leave_no_trace(model: Any) -> None:
    ids = torch.randint(20, 64, (2, 12))
    with torch.no_grad():
        before = model(input_ids=ids).logits
    factors = add_factors(model, rank=4)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(trained) == len(factors) == 2 * 2 * len(assembly.PROJECTIONS)
    assert language_loss(model, ids).item() == pytest.approx(0, abs=1e-6)
    for parameter in factors.values():
        nn.init.normal_(parameter, std=0.1)
    loss = language_loss(model, ids)
    loss.backward()
    assert loss.item() > 1e-3
    assert all(p.grad is not None and p.grad.any() for p in factors.values())
    with torch.no_grad(), smol.without_factors(model):
        torch.testing.assert_close(model(input_ids=ids).logits, before)
    assert [n for n, p in model.named_parameters() if p.requires_grad] == trained


def test_factors_are_merged_as_they_were_learnt(model: Any) -> None:
    ids = torch.randint(20, 64, (2, 12))
    plain = smollm2.qwen2_vl(LlamaForCausalLM(_llama(model)), TOWER)
    plain.load_state_dict(model.state_dict())
    for parameter in add_factors(model, rank=4).values():
        nn.init.normal_(parameter, std=0.1)
    assembly.merge(plain, smol.factors_of(model), 1.0)
    with torch.no_grad():
        merged, learnt = (m(input_ids=ids).logits for m in (plain, model))
    # Products of other sizes round differently, by processor.
    torch.testing.assert_close(merged, learnt, atol=5e-5, rtol=1e-5)


def _llama(model: Any) -> LlamaConfig:
    text = model.config.text_config
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
    names += ("num_attention_heads", "num_key_value_heads", "max_position_embeddings")
    return LlamaConfig(**{name: getattr(text, name) for name in names}, tie_word_embeddings=True)


class KilledError(Exception):
    """A stage is broken off."""


def trained(folder: Path, kill_at: int | None = None, steps: int = 60) -> Tensor:
    torch.manual_seed(0)
    layer = nn.Linear(3, 2)

    def lesson(step: Step) -> tuple[Tensor, dict[str, float]]:
        if step.number == kill_at:
            raise KilledError
        x = torch.randn(4, 3, generator=step.generator)
        return (layer(x) - step.rng.random()).square().mean(), {"seen": 1.0}

    parameters = dict(layer.named_parameters())
    smol.learn("stage", folder, parameters, lesson, steps, peak=0.1, seed=0, warmup=5)
    return layer.weight.data


def test_a_stage_broken_off_ends_as_an_unbroken_one(tmp_path: Path) -> None:
    whole = trained(tmp_path / "whole")
    with pytest.raises(KilledError):
        trained(tmp_path / "broken", kill_at=40)
    assert torch.equal(trained(tmp_path / "broken"), whole)
    # Done already: nothing is learnt anew.
    assert torch.equal(trained(tmp_path / "broken", kill_at=0), whole)


def test_a_stage_of_another_recipe_is_refused(tmp_path: Path) -> None:
    trained(tmp_path)
    with pytest.raises(ValueError, match=r"expected .*'steps': 80.* Remove it"):
        trained(tmp_path, steps=80)


@settings(deadline=None)
@given(digit=st.integers(0, 9), turned=st.sampled_from([0.0, 0.5]), seed=st.integers(0, 10_000))
def test_digits_are_asked_about_truly(digit: int, turned: float, seed: int) -> None:
    text, answer = ask_digit(digit, turned, random.Random(seed))
    words = text.rstrip("?").split()
    assert turned or not {"odd", "less"} & {*words}
    if text in digits.VALUE:
        assert answer == digits.NUMBERS[digit]
    elif "than" in words:
        bound = digits.NUMBERS.index(words[-1])
        truth = digit > bound if "greater" in words else digit < bound
        assert answer == ("yes" if truth else "no")
    else:
        assert answer == ("yes" if (digit % 2 == 0) == ("even" in words) else "no")


@pytest.mark.parametrize("ask", ["image", "text"])
def test_packed_answers_are_those_that_are_generated(shapes: Any, ask: str) -> None:
    samples = ml.datasets.load("easy-vqa", limit=60, ask=ask)
    neurons = ml.NeuronSet.random(1300, like=ml.mine(shapes, samples[:2]).select()["text"])
    with ml.ablate(shapes, neurons):  # so that some are wrong
        table = ml.answers(shapes, samples, 20, 6).to_frame()
        right = which_are_right(shapes, samples)
    assert [right[name] for name in table["id"]] == table["correct"].tolist()
    assert 0.1 < table["correct"].mean() < 0.95

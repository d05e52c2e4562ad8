"""A prompt with its answer after it is read as the model reads what it generates itself."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import miner_lens as ml
from miner_lens.analyzers.attribution import AttributionAnalyzer
from miner_lens.models.forcing import answered, force
from tests.experiments import naive_logprob
from tests.parts import FAMILIES
from tests.towers import AUDIO, IMAGE, VIDEO

TOKENS = 3


@pytest.mark.parametrize("name", FAMILIES)
def test_an_answer_is_read_as_if_it_had_been_generated(name: str) -> None:
    """In PaliGemma, for one, a prompt attends to all of itself, and to nothing of the answer."""
    model, inputs = FAMILIES[name].make()
    with torch.no_grad():
        made = model.generate(
            **inputs,
            do_sample=False,
            min_new_tokens=TOKENS,
            max_new_tokens=TOKENS,
            suppress_tokens=[IMAGE, VIDEO, AUDIO],  # there is no medium for one in an answer
            output_logits=True,
            return_dict_in_generate=True,
        )
        answer = made.sequences[:, -TOKENS:]
        longer = answered(model, inputs, answer)
        logits = model(**longer, use_cache=False).logits
    assert longer["attention_mask"][:, -TOKENS:].all()
    assert torch.equal(longer["input_ids"][:, -TOKENS:], answer)
    expected = torch.stack(made.logits, 1)
    torch.testing.assert_close(logits[:, -TOKENS - 1 : -1], expected, atol=1e-4, rtol=0)


def test_what_a_model_does_not_know_of_is_0() -> None:
    model, inputs = FAMILIES["qwen2_vl"].make()
    own = torch.ones_like(inputs["input_ids"])
    longer = answered(model, {**inputs, "own": own}, torch.tensor([[5, 6]] * len(own)))
    assert longer["own"][:, -2:].eq(0).all()
    assert longer["own"].shape == longer["input_ids"].shape


def turns(*texts: str, media: Any = ()) -> list[dict[str, Any]]:
    """The turns of a user and an assistant, by turns; media belong to the first."""
    parts = [[*media, {"type": "text", "text": texts[0]}]]
    parts += [[{"type": "text", "text": text}] for text in texts[1:]]
    return [
        {"role": ("user", "assistant")[n % 2], "content": content}
        for n, content in enumerate(parts)
    ]


@pytest.fixture(scope="module")
def mixed() -> list[ml.Sample]:
    """Conversations that await an answer, and that end with one, with answers of any length."""
    image = [ml.datasets.load("easy-vqa", limit=1, ask="image")[0].messages[0]["content"][0]]
    return [
        ml.Sample(turns("is there a red circle?", "red"), "red"),
        ml.Sample(turns("what color is it?", media=image), "a red circle"),
        ml.Sample(turns("what color is it?", "blue", media=image), "no, it is blue"),
        ml.Sample(turns("is it red?", "no", "what is it?"), "a circle"),
        ml.Sample(turns("is it red?", "no", "what is it?", "teal"), "yes"),
    ]


@pytest.mark.parametrize("batch_size", [1, 5, "auto"])
def test_what_is_mined_is_the_same_with_an_answer_behind_it(
    shapes: Any, mixed: list[ml.Sample], batch_size: Any
) -> None:
    unanswered = [ml.Sample(one.messages) for one in mixed]
    alone = ml.mine(shapes, unanswered, batch_size=batch_size, progress=False)
    analyzers = ml.ImportanceAnalyzer(), AttributionAnalyzer()
    beside, _ = ml.run(shapes, mixed, *analyzers, batch_size=batch_size, progress=False)
    assert beside.modalities == alone.modalities
    torch.testing.assert_close(beside.values, alone.values, atol=1e-5, rtol=0)
    assert beside.occurrences == alone.occurrences


def test_an_answer_to_a_closed_conversation_is_a_further_turn(
    shapes: Any, mixed: list[ml.Sample]
) -> None:
    table = ml.trials(shapes, mixed, [ml.Condition("intact")], progress=False)
    expected = [naive_logprob(shapes, sample) for sample in mixed]
    np.testing.assert_allclose(table.logprob[0], expected, atol=1e-4)
    # By Hugging Face: the conversation as it is, and the opening of a turn.
    closed = mixed[0]
    forced = force(shapes, closed)
    length = forced.length - forced.opening - len(forced.answer)
    for prompt, count in (False, length), (True, length + forced.opening):
        ids = shapes.processor.apply_chat_template(
            closed.messages, tokenize=True, return_dict=True, add_generation_prompt=prompt
        )["input_ids"][0]
        assert forced.inputs["input_ids"][0, :count].tolist() == ids
    assert forced.prompt["input_ids"].shape[1] == length + forced.opening


def test_an_answer_stands_for_no_medium(shapes: Any, mixed: list[ml.Sample]) -> None:
    sample = ml.Sample(mixed[0].messages, "the <|image_pad|>")
    with pytest.raises(ml.SampleError, match="1 tokens that stand for a medium"):
        ml.trials(shapes, [sample], [ml.Condition("intact")], progress=False)

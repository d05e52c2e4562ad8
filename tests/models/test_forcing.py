"""A prompt with its answer after it is read as the model reads what it generates itself."""

from __future__ import annotations

import pytest
import torch

from miner_lens.models.forcing import answered
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

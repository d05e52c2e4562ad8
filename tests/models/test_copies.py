"""How a result of several copies of the same samples follows from that of one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers.modeling_outputs import BaseModelOutputWithPooling

from miner_lens.models.copies import equal, grown, growth, single

ROWS, OTHER = torch.arange(6.0).view(3, 2), torch.ones(2, 5)


def result(*samples: torch.Tensor) -> Any:
    """What a tower might give: rows, a tensor for each sample, and rows for each of two layers."""
    together = torch.cat(samples)
    return BaseModelOutputWithPooling(
        last_hidden_state=together,
        pooler_output=tuple(one.sum(0) for one in samples),
        hidden_states=(together, together + 1),
    )


def test_a_result_is_put_together_as_if_computed() -> None:
    how = growth(result(ROWS, ROWS + 1), result(ROWS, ROWS + 1, ROWS, ROWS + 1))
    assert how == {
        "last_hidden_state": "rows",
        "pooler_output": "items",
        "hidden_states": ["rows", "rows"],
    }
    some = [ROWS * 2, ROWS * 3, ROWS]  # other samples, and another number of them
    made = grown(result(*some), how, 3)
    assert type(made) is BaseModelOutputWithPooling
    assert equal(made, result(*some * 3))


@pytest.mark.parametrize(
    ("one", "two"),
    [
        (ROWS, torch.cat([ROWS, ROWS + 1])),  # samples know of one another
        (ROWS, torch.cat([ROWS] * 3)),
        (ROWS, ROWS + 1),
        ([1, 2], [1, 2, 1, 3]),
        ([1, 2], [1, 2, 1]),
        ({"a": ROWS, "b": 1}, {"a": torch.cat([ROWS] * 2), "b": 2}),
        (1, ROWS),
    ],
)
def test_where_it_does_not_follow(one: Any, two: Any) -> None:
    assert growth(one, two) is None


def test_rounding_is_no_difference() -> None:
    assert growth(ROWS, torch.cat([ROWS, ROWS * (1 + 1e-6)])) == "rows"
    assert growth(OTHER, OTHER) == "same"
    assert growth(None, None) == "same"


def test_the_first_of_equal_parts() -> None:
    assert torch.equal(single(torch.cat([ROWS] * 4), 4), ROWS)
    assert single([1, 2, 1, 2], 2) == [1, 2]
    for value in (ROWS, [1, 2, 3, 4], torch.tensor(1.0), None, "text", []):
        assert single(value, 2) is value

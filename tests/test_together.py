"""The benchmark of all analyzers in one run: what it counts, and what it says of times."""

from __future__ import annotations

from typing import Any

import pytest

import miner_lens as ml
from benchmarks import together


@pytest.fixture(scope="module")
def data() -> Any:
    found = ml.datasets.load("easy-vqa", limit=4, ask="both")
    return {"first": found[:2], "second": found[2:]}


def test_one_run_reads_each_point_once(shapes: Any, data: Any) -> None:
    found = together.readings(shapes, data, batch_size=2)
    assert found["passes"] == 2
    # X, the residual stream and the pattern of six layers.
    assert found["points"] == 18
    assert found["most_readings_of_a_point_in_a_pass"] == 1
    assert found["least_readings_of_a_point_in_a_pass"] == 1


def test_all_analyzers_run_together_and_alone(shapes: Any, data: Any) -> None:
    made = together.workloads(shapes, data, batch_size=4)
    names = set(made) - {together.TOGETHER, together.PLAIN, together.BACKWARD}
    assert {"importance, vision", "domains, projector", "kinds", "tuned lens"} <= names
    results: Any = made[together.TOGETHER]()
    assert len(results) == len(names)
    assert made[together.PLAIN]() is None
    assert made[together.BACKWARD]() is None
    alone: Any = made["domains, vision"]()
    assert alone.over_zero.equal(
        results[list(together.analyzers(shapes)).index("domains, vision")].over_zero
    )


def test_what_the_times_say() -> None:
    times = {
        together.TOGETHER: [5.0, 5.0],
        together.PLAIN: [2.0, 2.0],
        together.BACKWARD: [3.0, 3.0],
        "one": [4.0, 4.0],
        "other": [3.0, 3.0],
    }
    found = together.compare(times)
    assert found["own_seconds"] == {"one": 2.0, "other": 1.0}
    assert found["together_by_plain_and_own"]["median"] == 1
    assert found["within_the_sum"]
    found = together.compare({**times, together.TOGETHER: [6.0, 6.0]})
    assert found["together_by_plain_and_own"]["median"] == pytest.approx(1.2)
    assert not found["within_the_sum"]

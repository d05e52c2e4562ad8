from __future__ import annotations

import pandas as pd

from miner_lens.reporting import findings

CONTROLS = pd.DataFrame(
    {
        "label": "image",
        "condition": "all MSNs at 2.0%",
        "against": ["random", "layer-matched"],
        "measure": "correct",
        "cost": 0.5,
        "cost_low": 0.4,
        "cost_high": 0.6,
        "control": [0.1, 0.45],
        "control_low": [-0.0001, 0.3],
        "control_high": [0.2, 0.7],
        "difference": [0.4, 0.05],
        "low": [0.3, -0.1],
        "high": [0.45, 0.2],
        "beyond_chance": [True, False],
    }
)


def test_a_sentence_beside_controls() -> None:
    sentence, family = findings.beside_controls(CONTROLS, 44)
    assert sentence == (
        "Asked about the image, switching off all MSNs at 2.0% costs 0.500 [0.400, 0.600] of the "
        "accuracy; as many random neurons cost 0.100 (0.000 to 0.200 by seed), a difference of "
        "0.400 [0.300, 0.450]: more than chance; as many random ones in each layer cost 0.450 "
        "(0.300 to 0.700 by seed), a difference of 0.050 [-0.100, 0.200]: not shown to be more "
        "than chance."
    )
    assert "all 44 comparisons" in family


def test_a_sentence_on_specificity() -> None:
    row = {"condition": "image MSNs at 2.0%", "own": "image", "other": "text"}
    row |= {"measure": "logprob", "verdict": "hurts the other more"}
    numbers = {"own_cost": 0.1, "own_low": 0.0, "own_high": 0.2, "other_cost": 0.4}
    numbers |= {"other_low": 0.3, "other_high": 0.5, "difference": -0.3, "low": -0.4, "high": -0.2}
    (sentence,) = findings.specificity(pd.DataFrame([row | numbers]))
    assert sentence == (
        "Switching off image MSNs at 2.0% costs image questions 0.100 [0.000, 0.200] nats of the "
        "answer's log-probability and text questions 0.400 [0.300, 0.500]; difference -0.300 "
        "[-0.400, -0.200]: hurts the other more."
    )


def test_a_sentence_on_answers_that_go_on() -> None:
    keys = {"label": "image", "condition": ["intact", "intact", "image MSNs", "image MSNs"]}
    begun = pd.DataFrame(keys | {"correct": [True, True, True, False]})
    ended = pd.DataFrame(keys | {"correct": [True, True, False, False]})
    assert list(findings.endings(begun, ended)) == [
        "Asked about the image, with nothing off, 100.0% of the answers begin right and 100.0% "
        "also end there.",
        "Asked about the image, with image MSNs off, 50.0% of the answers begin right and 0.0% "
        "also end there.",
    ]

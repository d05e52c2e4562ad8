from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from miner_lens.experiments.statistics import (
    Comparison,
    against_controls,
    averaged,
    costs,
    specificity,
)

few = settings(max_examples=20, deadline=None)
numbers = st.floats(-4, 4).map(lambda number: round(number, 3))
rows_of_eight = st.lists(numbers, min_size=8, max_size=8)


@pytest.fixture(autouse=True, scope="module")
def _no_collection() -> Iterator[None]:
    """statsmodels collects garbage in each adjustment, a quarter of a second beside a model."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gc.collect", lambda *_: 0)
        yield


def table(
    logprob: Mapping[str, Sequence[float]],
    correct: Mapping[str, Sequence[bool]] | None = None,
    label: str | None = "image",
) -> pd.DataFrame:
    """Trials of `q/0/<label>`, `q/1/<label>`, ... by condition."""
    return pd.DataFrame(
        [
            {
                "sample": f"q/{number}/{label}",
                "label": label,
                "condition": condition,
                "correct": True if correct is None else correct[condition][number],
                "logprob": value,
            }
            for condition, values in logprob.items()
            for number, value in enumerate(values)
        ]
    )


def row(found: pd.DataFrame, **wanted: str) -> Any:
    (index,) = found.index[(found[list(wanted)] == pd.Series(wanted)).all(axis=1)]
    return found.loc[index]


def question(sample: str) -> str:
    return sample.rpartition("/")[0]


def test_costs_by_hand() -> None:
    trials = table(
        {"intact": [-1, -1, -2, 0], "off": [-3, -1, -3, -1]},
        {"intact": [True, True, False, True], "off": [False, True, True, False]},
    )
    found = costs(trials.sample(frac=1, random_state=0))
    off = row(found, condition="off", measure="logprob")
    assert (off["value"], off["cost"], off["samples"], off["label"]) == (-2, 1, 4, "image")
    assert 0 <= off["low"] < 1 < off["high"] <= 2
    assert row(found, condition="off", measure="correct")["cost"] == 0.25
    intact = row(found, condition="intact", measure="correct")
    assert (intact["value"], intact["cost"], intact["low"], intact["high"]) == (0.75, 0, 0, 0)
    assert len(found) == 4


@few
@given(rows_of_eight, rows_of_eight)
def test_intervals_agree_with_a_naive_bootstrap(intact: list[float], off: list[float]) -> None:
    found = row(costs(table({"intact": intact, "off": off})), condition="off", measure="logprob")
    lost = np.array(intact) - np.array(off)
    drawn = np.random.default_rng(1).integers(0, 8, (20_000, 8))
    expected = np.quantile(lost[drawn].mean(1), [0.025, 0.975])
    assert found["cost"] == pytest.approx(lost.mean())
    # Two simulations differ; by so much of the standard error at most.
    np.testing.assert_allclose([found["low"], found["high"]], expected, atol=1e-9 + lost.std() / 10)


@few
@given(rows_of_eight, rows_of_eight)
def test_p_values_agree_with_all_changes_of_sign(off: list[float], control: list[float]) -> None:
    trials = table({"intact": [0.0] * 8, "off": off, "random": control})
    found = against_controls(trials, [Comparison("off", "random", ["random"])], resamples=256)
    differences = np.array(control) - np.array(off)
    signs = np.array(list(itertools.product([1, -1], repeat=8)))
    expected = ((signs * differences).mean(1) >= differences.mean() - 1e-9).mean()
    assert row(found, measure="logprob")["p"] == pytest.approx(expected)
    assert row(found, measure="correct")["p"] == 1


@few
@given(st.lists(rows_of_eight, min_size=4, max_size=4))
def test_holm_is_over_the_whole_table(values: list[list[float]]) -> None:
    logprob = {"intact": [0.0] * 8, **dict(zip("abcr", values, strict=True))}
    trials = pd.concat([table(logprob), table(logprob, label="text")])
    found = against_controls(trials, [Comparison(one, "random", ["r"]) for one in "abc"])
    assert len(found) == 3 * 2 * 2
    ranked = found["p"].sort_values()
    naive = (ranked * np.arange(len(ranked), 0, -1)).cummax().clip(upper=1)
    np.testing.assert_allclose(found["p_holm"], naive.sort_index())


def test_controls_by_hand() -> None:
    trials = table(
        {
            "intact": [0.0] * 8,
            "off": [-4.0, -5, -4, -5, -4, -5, -4, -5],
            "r0": [-1.0] * 8,
            "r1": [-1.0, -2, -3, -4, -1, -2, -3, -4],
            "huge": [-9.0] * 8,
        }
    )
    comparisons = [
        Comparison("off", "random", ["r0", "r1"]),
        Comparison("off", "all three", ["r0", "r1", "huge"]),
        Comparison("huge", "random", ["r0"]),
    ]
    found = against_controls(trials, comparisons)
    first = row(found, condition="off", against="random", measure="logprob")
    assert first["cost"] == 4.5
    assert (first["control"], first["control_low"], first["control_high"]) == (1.75, 1, 2.5)
    assert first["difference"] == 2.75
    assert 1.75 < first["low"] < 2.75 < first["high"] < 3.5
    assert first["p"] == 1 / 2**8
    assert first["beyond_chance"]
    three = row(found, against="all three", measure="logprob")
    assert three["control"] == pytest.approx(12.5 / 3)
    # One control costs more, so whichever neurons are drawn may do so.
    assert not three["beyond_chance"]
    assert not found[found["measure"] == "correct"]["beyond_chance"].any()


def test_comparisons_are_made_where_they_can_be() -> None:
    here = table({"intact": [0.0, 1], "off": [1.0, 2], "r": [0.0, 1], "own": [1.0, 2]})
    there = table({"intact": [0.0, 1], "off": [1.0, 2], "r": [0.0, 1]}, label="text")
    comparisons = [Comparison("off", "random", ["r"]), Comparison("own", "random", ["r"])]
    found = against_controls(pd.concat([here, there]), comparisons)
    made = found[found["measure"] == "correct"][["label", "condition"]].to_numpy().tolist()
    assert made == [["image", "off"], ["image", "own"], ["text", "off"]]


def test_averaged_by_hand() -> None:
    trials = table(
        {"intact": [0.0, 0], "a": [1.0, 2], "b": [3.0, 6], "c": [9.0, 9]},
        {"intact": [True] * 2, "a": [True, False], "b": [False] * 2, "c": [True] * 2},
        label=None,
    )
    found = averaged(trials, {"intact": ["intact"], "both": ["a", "b"]})
    assert found["condition"].tolist() == ["intact", "intact", "both", "both"]
    assert found["logprob"].tolist() == [0, 0, 2, 4]
    assert found["correct"].tolist() == [1, 1, 0.5, 0]
    assert costs(found)["cost"].tolist() == [0, 0.75, 0, -3]


def ways(image: Sequence[float], text: Sequence[float]) -> pd.DataFrame:
    """Trials of the same questions in two ways, and one more question in one of them."""
    both = [
        table({"intact": [0.0] * len(some), "image MSNs": some}, label=label)
        for label, some in (("image", image), ("text", text))
    ]
    return pd.concat([both[0], both[1].iloc[::-1]])


def test_specificity_by_hand() -> None:
    image, text = [-3.0, -4, -3, -4, -3, -4], [-1.0, -1, -1, -1, -1, -1, -90]
    found = row(
        specificity(ways(image, text), {"image MSNs": "image"}, question), measure="logprob"
    )
    assert (found["own"], found["other"], found["questions"]) == ("image", "text", 6)
    assert (found["own_cost"], found["other_cost"], found["difference"]) == (3.5, 1, 2.5)
    assert (found["other_low"], found["other_high"]) == (1, 1)
    assert 2 <= found["low"] < 2.5 < found["high"] <= 3
    assert found["high"] == pytest.approx(found["own_high"] - 1)
    assert found["verdict"] == "specific"
    turned = specificity(ways(image, text), {"image MSNs": "text"}, question)
    assert row(turned, measure="logprob")["verdict"] == "hurts the other more"
    assert row(turned, measure="logprob")["difference"] == -2.5
    assert row(turned, measure="correct")["verdict"] == "not shown to be specific"


def test_specificity_is_paired() -> None:
    """Questions differ far more than the two ways of asking one, which pairing sees through."""
    hard = np.linspace(0, 50, 40)
    trials = ways((-hard - 1).tolist(), (-hard - 0.5 * np.sin(hard)).tolist())
    found = row(specificity(trials, {"image MSNs": "image"}, question), measure="logprob")
    assert found["high"] - found["low"] < 0.5 < found["own_high"] - found["own_low"]
    assert found["verdict"] == "specific"


@pytest.mark.parametrize("skewed", [False, True])
def test_intervals_cover_the_truth(skewed: bool) -> None:
    """Of 300 intervals from 60 samples each, near 95 % cover the mean: 90 to 98 %."""
    rng = np.random.default_rng(0)
    lost = rng.exponential(1, (300, 60)) if skewed else rng.normal(1, 1, (300, 60))
    logprob = {f"c{number}": (-values).tolist() for number, values in enumerate(lost)}
    found = costs(table({"intact": [0.0] * 60, **logprob}), resamples=500)
    found = found[(found["measure"] == "logprob") & (found["condition"] != "intact")]
    covered = ((found["low"] <= 1) & (found["high"] >= 1)).mean()
    assert 0.90 <= covered <= 0.98


def test_false_findings_are_rare_in_the_whole_family() -> None:
    """Of 150 families of 8 conditions like their controls, at most 5 % find one; with three
    standard errors, 10.3 %. Without Holm it would be about a third.
    """
    rng = np.random.default_rng(0)
    comparisons = [Comparison(f"c{one}", "random", ["r"]) for one in range(8)]
    findings = unadjusted = 0
    for _ in range(150):
        off = {f"c{one}": rng.normal(-1, 1, 20).tolist() for one in range(8)}
        control = {"r": rng.normal(-1, 1, 20).tolist()}
        trials = table({"intact": [0.0] * 20, **off, **control})
        found = against_controls(trials, comparisons, resamples=499)
        findings += bool(found["beyond_chance"].any())
        unadjusted += bool((found["p"] <= 0.05).any())
    assert findings <= 0.103 * 150
    assert unadjusted >= 0.15 * 150


def test_what_cannot_be_compared() -> None:
    trials = table({"intact": [0.0, 1], "off": [1.0, 2]})
    some = [Comparison("off", "random", ["intact"])]
    with pytest.raises(ValueError, match="no condition 'whole'; there are 'intact', 'off'"):
        costs(trials, intact="whole")
    with pytest.raises(ValueError, match="was not tried on every sample of label 'image'"):
        costs(trials.iloc[:-1])
    with pytest.raises(ValueError, match="one sample; an interval needs"):
        costs(table({"intact": [0.0], "off": [1.0]}))
    with pytest.raises(ValueError, match="Under label 'text' there is no condition 'intact'"):
        costs(pd.concat([trials, table({"off": [1.0, 2]}, label="text")]))
    with pytest.raises(ValueError, match="nothing to compare"):
        against_controls(trials, [])
    with pytest.raises(ValueError, match="'off' has no control conditions"):
        against_controls(trials, [Comparison("off", "random", [])])
    with pytest.raises(ValueError, match="no condition 'no'"):
        against_controls(trials, [Comparison("no", "random", ["off"])])
    apart = [trials, table({"intact": [0.0, 1], "own": [1.0, 2]}, label="text")]
    with pytest.raises(ValueError, match="No label has a condition and its controls"):
        against_controls(pd.concat(apart), [Comparison("own", "random", ["off"])])
    assert len(against_controls(trials, some)) == 2


def test_what_is_not_asked_in_two_ways() -> None:
    trials = ways([0.0, 1], [1.0, 2])
    own = {"image MSNs": "image"}
    with pytest.raises(ValueError, match="no label 'sound'; there are 'image', 'text'"):
        specificity(trials, {"image MSNs": "sound"}, question)
    with pytest.raises(ValueError, match="no condition 'no'"):
        specificity(trials, {"no": "image"}, question)
    with pytest.raises(ValueError, match="share no question: one has 'q/0/image'"):
        specificity(trials, own, str)
    with pytest.raises(ValueError, match="Question 'q' is asked twice"):
        specificity(trials, own, lambda sample: sample[0])
    with pytest.raises(ValueError, match="tried under two labels"):
        specificity(trials[trials["label"] == "image"], own, question)
    with pytest.raises(ValueError, match="no condition 'no'"):
        averaged(trials, {"one": ["no"]})


@pytest.mark.parametrize("package", ["scipy", "statsmodels.stats.multitest"])
def test_missing_packages_are_named(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    trials = table({"intact": [0.0, 1], "off": [1.0, 2]})
    with pytest.raises(ImportError, match=r"pip install miner-lens\[demo\]"):
        against_controls(trials, [Comparison("off", "random", ["intact"])])

"""Recovery: what is found of what was planted, by the definition and on planted models."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
import torch

import miner_lens as ml
from miner_lens.experiments.recovery import found_of
from miner_lens.organisms.planting import CASES

STRATEGIES = ("LA_MU", "contrastive", "lape", "random")


@pytest.fixture(scope="module")
def found() -> ml.experiments.Recovery:
    plantings = (ml.organisms.planted(case, seed=7, samples=32) for case in CASES)
    return ml.experiments.recovery(plantings, STRATEGIES)


def precision(found: ml.experiments.Recovery, case: str, metric: str, strategy: str) -> float:
    chosen = found.means.query("case == @case and metric == @metric and strategy == @strategy")
    return float(chosen["precision"].item())


def test_known_neurons_are_found(found: ml.experiments.Recovery) -> None:
    """The easy cases by what is specific, and all of them by what counts for the answer."""
    for case in ("strong", "plain", "weak"):
        assert precision(found, case, "prob", "contrastive") >= 0.95
    for case in CASES:
        assert precision(found, case, "attribution", "LA_MU") >= 0.95
    for case in ("plain", "rare", "weak", "flipped", "idle"):
        assert precision(found, case, "published", "LA_MU") < 0.2  # strong, not specific


def test_the_table(found: ml.experiments.Recovery) -> None:
    table = found.frame
    assert len(table) == len(CASES) * 8 * len(STRATEGIES) * 2
    assert (table["planted"] == 16).all()
    equal = table[table["strategy"].isin(["LA_MU", "contrastive", "random"])]
    assert (equal["selected"] == 16).all()
    pd.testing.assert_series_equal(equal["precision"], equal["recall"], check_names=False)
    hits = table["precision"] * table["selected"]
    assert (hits - table["recall"] * table["planted"]).abs().max() < 1e-9


def test_the_result_reads_itself(found: ml.experiments.Recovery, tmp_path: Path) -> None:
    assert "flipped: attribution by LA_MU, 1.00 (MINER's default 0.00)" in found.summary
    panels = [axis for axis in found.figure().axes if axis.get_title()]
    assert [panel.get_title() for panel in panels] == list(CASES)
    drawn = panels[1].images[0].get_array()
    assert drawn.shape == (8, len(STRATEGIES))
    assert drawn[0, 1] == precision(found, "plain", "prob", "contrastive")
    found.save(tmp_path / "found.safetensors")
    again = ml.experiments.Recovery.load(tmp_path / "found.safetensors")
    pd.testing.assert_frame_equal(again.frame, found.frame)


def test_by_the_definition() -> None:
    values = torch.rand(5, 3, 2, 30)
    scores = ml.ImportanceScores(values, ["text", "special", "image"])
    known = ml.NeuronSet([(0, 1), (0, 5), (1, 7)], layers=2, neurons=30)
    table = found_of(scores, {"image": known}, weights={"max": 1.0})
    best = values[2, 2].flatten().argsort(descending=True)[:3].tolist()
    hits = len({divmod(place, 30) for place in best} & set(known))
    assert table.to_dict("records") == [
        {
            "modality": "image",
            "planted": 3,
            "selected": 3,
            "precision": hits / 3,
            "recall": hits / 3,
        }
    ]
    with pytest.raises(ValueError, match=r"selected for 'audio', only for text, special, image"):
        found_of(scores, {"audio": known})


def test_a_planted_model_is_left_as_it_was() -> None:
    planting = ml.organisms.planted(samples=8)
    ml.experiments.recovery([planting], ["LA_MU"])
    ml.unwrap(ml.wrap(planting.model, planting.processor))
    with pytest.raises(ValueError, match="no strategy 'best'"):
        ml.experiments.recovery([planting], ["best"])
    with pytest.raises(ValueError, match="no planted model"):
        ml.experiments.recovery([])

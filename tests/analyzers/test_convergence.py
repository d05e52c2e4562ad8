"""Hidden states as the model has them, and their curves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import miner_lens as ml
from miner_lens.scoring import convergence


@pytest.fixture(scope="module")
def samples() -> list[ml.Sample]:
    return list(ml.datasets.load("easy-vqa", limit=12, ask="both"))


@pytest.fixture(scope="module")
def states(shapes: Any, samples: Any) -> ml.HiddenStates:
    return ml.run(shapes, samples, ml.ConvergenceAnalyzer(), batch_size=4, progress=False)


def test_states_are_the_models(shapes: Any, samples: Any, states: ml.HiddenStates) -> None:
    assert states.modalities == ("text", "special", "image")
    assert {name: len(one) for name, one in states.means.items()} == {
        "text": 12,
        "special": 12,
        "image": 6,
    }
    number = int(states.samples["image"][2])
    inputs = ml.inputs(shapes, samples[number].messages)
    names = [point.name for point in ml.residual_points(shapes)]
    ids = inputs.pop("input")
    _, cache = shapes.run_with_cache(ids, names_filter=names, **inputs)
    image = shapes.modality_layout.masks(ids)["image"][0]
    for layer, name in enumerate(names):
        own = cache[name][0, image]
        torch.testing.assert_close(
            states.means["image"][2, layer], own.mean(0), atol=1e-5, rtol=1e-4
        )
        for token in states.drawn["image"][2, layer]:
            assert (own - token).abs().amax(1).min() < 1e-4


def test_they_do_not_depend_on_batches_or_processes(
    shapes: Any, samples: Any, states: ml.HiddenStates
) -> None:
    one, two = ml.ConvergenceAnalyzer(), ml.ConvergenceAnalyzer()
    few = ml.ConvergenceAnalyzer(samples=5, tokens=2)
    ml.run(shapes, samples, one, few, batch_size=1, progress=False)
    for name in states.modalities:
        alone = one.result()
        assert torch.equal(alone.samples[name], states.samples[name])
        torch.testing.assert_close(alone.drawn[name], states.drawn[name], atol=1e-4, rtol=1e-4)
    assert few.result().drawn["text"].shape[:3] == (5, 6, 2)
    assert few.settings != two.settings


def test_curves(states: ml.HiddenStates, tmp_path: Path) -> None:
    table = states.curves(shuffles=3)
    assert set(table["measure"]) == {"cka", "distance", "separability", "dimension"}
    pairs = set(zip(table["modality"], table["other"], strict=True))
    assert ("text", "image") in pairs
    assert ("image", "") in pairs
    row = table.query("measure == 'distance' and other == 'image' and modality == 'text'").iloc[2]
    both = [states.samples["text"].tolist().index(n) for n in states.samples["image"].tolist()]
    text = states.drawn["text"][both, 2].flatten(0, 1).double().numpy()
    image = states.drawn["image"][:, 2].flatten(0, 1).double().numpy()
    assert row["mean"] == pytest.approx(convergence.centroid_distance(text, image))
    assert row["samples"] == 6
    assert row["null_low"] <= row["null"] <= row["null_high"]
    assert row["low"] < row["mean"] < row["high"]
    # Image and text tokens are not alike in the first layer.
    assert (
        table.query("measure == 'distance' and other == 'image'")["mean"].iloc[0]
        > (table.query("measure == 'distance' and other == 'image'")["null_high"].iloc[0])
    )
    shares, dimensions = (table[table["measure"] == one] for one in ("separability", "dimension"))
    assert shares["low"].ge(0).all()
    assert shares["high"].le(1).all()
    assert dimensions["low"].ge(1).all()
    states.save(tmp_path / "states.safetensors")
    loaded = ml.HiddenStates.load(tmp_path / "states.safetensors")
    assert repr(loaded) == repr(states)
    again = loaded.curves(["cka"], [("text", "image")], shuffles=3)
    first = states.curves(["cka"], [("text", "image")], shuffles=3)
    assert again.equals(first)
    assert len(again) == 6


def test_a_picture(states: ml.HiddenStates) -> None:
    table = states.embed(3)
    assert len(table) == 4 * (12 + 12 + 6)
    assert table.equals(states.embed(3))
    figure = ml.plots.scatter(table)
    assert len(figure.axes[0].collections) == 3
    with pytest.raises(ValueError, match="There is no method 'pca'"):
        states.embed(0, "pca")


def test_what_cannot_be(states: ml.HiddenStates) -> None:
    with pytest.raises(ValueError, match="There is no 'nearness'"):
        states.curves(["nearness"])
    with pytest.raises(ValueError, match="There is no modality 'video'"):
        states.curves(["cka"], [("text", "video")])
    few = ml.HiddenStates(
        {name: one[:3] for name, one in states.means.items()},
        {name: one[:3] for name, one in states.drawn.items()},
        {name: one[:3] for name, one in states.samples.items()},
    )
    with pytest.raises(ValueError, match="at least 4 are needed"):
        few.curves(["cka"], [("text", "special")])
    with pytest.raises(ValueError, match="at least 1 sample"):
        ml.ConvergenceAnalyzer(samples=0)
    with pytest.raises(ValueError, match="No sample has been seen"):
        ml.ConvergenceAnalyzer().result()

"""Semantic probing and telomeres as the model has them, and their curves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import miner_lens as ml
from miner_lens.scoring.arrangement import probing, telomeres


@pytest.fixture(scope="module")
def samples() -> list[ml.Sample]:
    return list(ml.datasets.load("easy-vqa", limit=8, ask="both"))


@pytest.fixture(scope="module")
def reach(shapes: Any, samples: Any) -> ml.SemanticReach:
    analyzer = ml.SemanticReachAnalyzer(shuffles=5)
    return ml.run(shapes, samples, analyzer, batch_size=4, progress=False)


def test_values_are_the_models(shapes: Any, samples: Any, reach: ml.SemanticReach) -> None:
    sizes = {name: tuple(values.shape) for name, values in reach.values.items()}
    assert sizes == {"probing/image": (4, 6, 6), "telomeres/special": (8, 6, 6)}
    inputs = ml.inputs(shapes, samples[2].messages)
    names = [point.name for point in ml.residual_points(shapes)]
    ids = inputs.pop("input")
    _, cache = shapes.run_with_cache(ids, names_filter=names, **inputs)
    masks = shapes.modality_layout.masks(ids)
    text, special, image = (
        masks[name][0].nonzero()[None, :, 0] for name in ("text", "special", "image")
    )
    row = {name: some.tolist().index(2) for name, some in reach.samples.items()}
    for layer, name in enumerate(names):
        probe = probing(cache[name][0], image, text).item()
        found = reach.values["probing/image"][row["probing/image"], layer, 0]
        assert found == pytest.approx(probe, abs=1e-4)
        ends = telomeres(cache[name][0], text, special).item()
        found = reach.values["telomeres/special"][row["telomeres/special"], layer, 0]
        assert found == pytest.approx(ends, abs=1e-6)


def test_they_do_not_depend_on_batches(shapes: Any, samples: Any, reach: ml.SemanticReach) -> None:
    halves = [ml.SemanticReachAnalyzer(shuffles=5) for _ in range(2)]
    alone = ml.SemanticReachAnalyzer(shuffles=5)
    ml.run(shapes, samples, alone, batch_size=1, progress=False)
    for name, values in reach.values.items():
        torch.testing.assert_close(alone.result().values[name], values, atol=1e-3, rtol=0)
    ml.run(shapes, samples[:4], halves[0], progress=False)
    ml.run(shapes, samples[4:], halves[1], progress=False)
    both = (halves[0] + halves[1]).result()
    assert both.values["telomeres/special"].shape == (8, 6, 6)
    few = ml.SemanticReachAnalyzer(tokens=5)
    assert few.settings != ml.SemanticReachAnalyzer().settings


def test_curves(reach: ml.SemanticReach, tmp_path: Path) -> None:
    table = reach.curves()
    row = table.query("measure == 'probing' and modality == 'image'").iloc[3]
    values = reach.values["probing/image"][:, 3].double()
    assert row["mean"] == pytest.approx(values[:, 0].mean().item())
    assert row["null"] == pytest.approx(values[:, 1:].mean().item())
    assert row["null_high"] == pytest.approx(values[:, 1:].mean(0).max().item())
    assert row["low"] <= row["mean"] <= row["high"]
    assert row["samples"] == 4
    reach.save(tmp_path / "reach.safetensors")
    loaded = ml.SemanticReach.load(tmp_path / "reach.safetensors")
    assert repr(loaded) == repr(reach)
    assert loaded.curves().equals(table)
    figure = ml.plots.curves(table, "telomeres")
    assert [line.get_linestyle() for line in figure.axes[0].lines] == ["-", ":"]


def test_what_cannot_be(shapes: Any, samples: Any, reach: ml.SemanticReach) -> None:
    with pytest.raises(ValueError, match="at least 3 tokens and 1 shuffle, not 2 and 20"):
        ml.SemanticReachAnalyzer(tokens=2)
    with pytest.raises(ValueError, match="No sample of 0 has 3 tokens"):
        ml.SemanticReachAnalyzer().result()
    pure = [one for one in samples if "/text" in one.id]
    text = ml.run(shapes, pure, ml.SemanticReachAnalyzer(), progress=False)
    assert set(text.values) == {"telomeres/special"}
    one = ml.SemanticReach(
        *({k: v[:1] for k, v in d.items()} for d in (reach.values, reach.samples))
    )
    with pytest.raises(ValueError, match="two samples or more"):
        one.curves()

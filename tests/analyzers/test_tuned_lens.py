"""The tuned lens: least squares against numpy, and whether it is worth fitting."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import miner_lens as ml
from miner_lens.analyzers import tuning
from miner_lens.scoring.tuned_lens import fit, unit


@pytest.fixture(scope="module")
def samples() -> list[ml.Sample]:
    return list(ml.datasets.load("easy-vqa", limit=64, ask="both"))


@pytest.fixture(scope="module")
def tuned(shapes: Any, samples: Any) -> ml.TunedLens:
    return ml.run(shapes, samples[:48], ml.TunedLensAnalyzer(), batch_size=8, progress=False)


@pytest.fixture(scope="module")
def divergence(shapes: Any, samples: Any, tuned: Any) -> ml.LensDivergence:
    test = ml.LensDivergenceAnalyzer(tuned)
    return ml.run(shapes, samples[48:], test, batch_size=8, progress=False)


def test_least_squares_are_numpys() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(40, 5)) + 2, rng.normal(size=(40, 5))
    means = (x.T @ x / 40, y.T @ x / 40, x.mean(0), y.mean(0))
    weight, bias = fit(*map(torch.from_numpy, means), ridge=0.0)
    design = np.concatenate([x, np.ones((40, 1))], 1)
    expected = np.linalg.lstsq(design, y, rcond=None)[0]
    np.testing.assert_allclose(weight.numpy(), expected[:5].T, atol=1e-8)
    np.testing.assert_allclose(bias.numpy(), expected[5], atol=1e-8)
    # With a heavy ridge it is the plain lens, but for a shift.
    weight, bias = fit(*map(torch.from_numpy, means), ridge=1e9)
    np.testing.assert_allclose(weight.numpy(), np.eye(5), atol=1e-6)
    np.testing.assert_allclose(bias.numpy(), y.mean(0) - x.mean(0), atol=1e-5)


def test_it_is_nearer_to_the_last_layer_on_other_data(divergence: ml.LensDivergence) -> None:
    for modality in ("text", "special", "image"):
        plain, tuned = (divergence.of(modality, name).mean(0) for name in ("plain", "tuned"))
        assert (tuned[:-1] < plain[:-1]).all(), modality
        assert plain[-1] == tuned[-1] == pytest.approx(0, abs=1e-5)


def test_divergence_is_the_models(
    shapes: Any, samples: Any, tuned: Any, divergence: ml.LensDivergence
) -> None:
    alone = ml.run(shapes, samples[48:49], ml.LensDivergenceAnalyzer(tuned), progress=False)
    inputs = ml.inputs(shapes, samples[48].messages)
    image = shapes.modality_layout.masks(inputs["input"])["image"][0]
    names = [point.name for point in ml.residual_points(shapes)]
    logits, cache = shapes.run_with_cache(**inputs, names_filter=names)
    wanted = logits[0, image].double().log_softmax(-1)
    for layer, name in enumerate(names[:-1]):
        x = cache[name][0, image]
        moved = unit(x) @ tuned.weights[layer].T + tuned.biases[layer]
        for measure, stream in (("plain", x), ("tuned", moved)):
            seen = shapes.unembed(shapes.ln_final(stream)).double().log_softmax(-1)
            by_hand = (wanted.exp() * (wanted - seen)).sum(-1).mean().item()
            found = alone.of("image", measure)[0, layer].item()
            assert found == pytest.approx(by_hand, rel=1e-3, abs=1e-4)
    distances = (divergence.values - alone.values).abs().flatten(1).amax(1)
    assert distances.min() < 1e-3


def test_few_logits_are_held_at_a_time(
    shapes: Any, samples: Any, tuned: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = ml.run(shapes, samples[48:50], ml.LensDivergenceAnalyzer(tuned), progress=False)
    held: list[int] = []
    own = tuning.Lens.logits

    def watched(lens: Any, x: torch.Tensor) -> torch.Tensor:
        logits = own(lens, x)
        held.append(logits.numel())
        return logits

    monkeypatch.setattr(tuning, "MOST_LOGITS", 10_000)
    monkeypatch.setattr(tuning.Lens, "logits", watched)
    parts = ml.run(shapes, samples[48:50], ml.LensDivergenceAnalyzer(tuned), progress=False)
    torch.testing.assert_close(parts.values, whole.values, atol=1e-5, rtol=1e-4)
    assert max(held) <= 10_000
    assert len(held) > 2 * 3 * 6


def test_a_fit_merges_and_looks_through(
    shapes: Any, samples: Any, tuned: ml.TunedLens, tmp_path: Path
) -> None:
    halves = [ml.TunedLensAnalyzer(), ml.TunedLensAnalyzer()]
    ml.run(shapes, samples[:20], halves[0], batch_size=3, progress=False)
    ml.run(shapes, samples[20:48], halves[1], batch_size=5, progress=False)
    merged = (halves[0] + halves[1]).result()
    assert merged.tokens == tuned.tokens
    torch.testing.assert_close(merged.weights, tuned.weights, atol=1e-2, rtol=0)
    tuned.save(tmp_path / "lens.safetensors")
    loaded = ml.TunedLens.load(tmp_path / "lens.safetensors")
    assert torch.equal(loaded.weights, tuned.weights)
    assert repr(loaded) == repr(tuned)
    plain, through = ml.run(
        shapes,
        samples[48:52],
        ml.LogitLensAnalyzer(),
        ml.LogitLensAnalyzer(loaded),
        batch_size=4,
        progress=False,
    )
    assert torch.equal(plain.of("last", "answer")[:, -1], through.of("last", "answer")[:, -1])
    assert not torch.allclose(plain.of("image")[:, 2], through.of("image")[:, 2], atol=1e-2)
    assert ml.LogitLensAnalyzer(loaded).settings == ml.LogitLensAnalyzer(tuned).settings
    assert ml.LogitLensAnalyzer(loaded).settings != ml.LogitLensAnalyzer().settings


def test_results_and_refusals(
    shapes: Any, divergence: ml.LensDivergence, tuned: Any, tmp_path: Path
) -> None:
    divergence.save(tmp_path / "divergence.safetensors")
    loaded = ml.LensDivergence.load(tmp_path / "divergence.safetensors")
    assert repr(loaded) == repr(divergence)
    assert set(loaded.curves()["measure"]) == {"plain", "tuned"}
    with pytest.raises(ValueError, match="layers 0 to 5 of width"):
        tuned.translate(torch.zeros(2, 7), 0)
    other = dataclasses.replace(
        tuned, identity=dataclasses.replace(tuned.identity, layers=3, fingerprint=None)
    )
    for analyzer in (ml.LogitLensAnalyzer(other), ml.LensDivergenceAnalyzer(other)):
        with pytest.raises(ValueError, match="The tuned lens"):
            analyzer.begin(shapes)
    with pytest.raises(ValueError, match="ridge must be 0 or more"):
        ml.TunedLensAnalyzer(-1.0)
    with pytest.raises(ValueError, match="No token has been seen"):
        ml.TunedLensAnalyzer().result()
    with pytest.raises(ValueError, match="no lens has been looked through"):
        ml.LensDivergenceAnalyzer(tuned).result()

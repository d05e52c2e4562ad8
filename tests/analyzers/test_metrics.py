"""`metrics=`: what is scored, without attention where that suffices, and `attended`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import miner_lens as ml
from miner_lens.models import attention
from miner_lens.scoring import kernels, select
from tests import towers
from tests.models.test_sites import ITEMS, Spy, collect, masks_of, plain
from tests.scoring.test_kernels import normalised

FREE = ("prob", "mean", "max")


@pytest.fixture(scope="module")
def small() -> Any:
    """A small random Qwen2-VL, and three prompts of it, padded on the left."""
    bridge = ml.wrap(towers.vision_model())
    inputs = towers.vision_inputs()
    return bridge, inputs, masks_of(bridge, inputs)


def mine(case: Any, **options: Any) -> ml.ImportanceScores:
    bridge, inputs, masks = case
    return ml.mine(bridge, [(inputs, masks)], progress=False, **options)


def test_some_metrics_are_those_of_all(small: Any) -> None:
    every = mine(small, metrics=kernels.ALL_METRICS)
    assert every.metrics == (*kernels.METRICS, "attended")
    assert torch.equal(every.values[:5], mine(small).values)
    for metrics in (FREE, ("attn_q", "mean"), ("attended",), ("max", "attended", "attn_k")):
        some = mine(small, metrics=metrics)
        assert some.metrics == metrics
        places = [kernels.ALL_METRICS.index(metric) for metric in metrics]
        torch.testing.assert_close(some.values, every.values[places], atol=1e-6, rtol=0)
        torch.testing.assert_close(some.means, every.means, atol=1e-6, rtol=0)
        assert some.occurrences == every.occurrences
    causal = mine(small, attention="causal", metrics=kernels.ALL_METRICS)
    assert torch.equal(causal.values[5], every.values[5])  # always the model's own pattern


def test_attended_is_the_definition(small: Any) -> None:
    """Against patterns that TransformerLens hands out, in fp64."""
    bridge, inputs, masks = small
    seen: dict[str, Tensor] = {}

    def keep(x: Tensor, hook: Any) -> None:
        seen[hook.name] = x.detach().double()

    layers = range(2)
    names = [f"blocks.{i}.{part}" for i in layers for part in ("attn.hook_pattern", POINT)]
    with torch.no_grad(), bridge.hooks(fwd_hooks=[(name, keep) for name in names]):
        bridge.original_model(**inputs)
    real = inputs["attention_mask"].bool()
    expected = torch.zeros(len(masks), 2, 48, dtype=torch.float64)
    for layer in layers:
        pattern = seen[f"blocks.{layer}.attn.hook_pattern"].mean(1)
        x = seen[f"blocks.{layer}.{POINT}"]
        for sample in range(len(real)):
            received = pattern[sample, real[sample]].sum(0)
            for place, mask in enumerate(masks.values()):
                own = mask[sample]
                if own.any():
                    weight = received[own] / received[own].sum()
                    expected[place, layer] += normalised(weight @ x[sample, own]) / len(real)
    found = mine(small, metrics=("attended",)).values[0]
    torch.testing.assert_close(found, expected.float(), atol=1e-5, rtol=0)


POINT = "mlp.act.hook_out"


@pytest.mark.parametrize("site", ["vision", "audio", "projector"])
def test_attended_in_a_tower(site: str) -> None:
    model, inputs = plain(site)
    spy = Spy(model, inputs, site)
    modalities = ("audio",) if site == "audio" else ("image", "video")
    expected = torch.zeros(len(modalities), len(spy.x), spy.x[0][0].shape[-1])
    for layer in sorted(spy.x):
        for call, modality in enumerate(modalities):
            for items in ITEMS[modality].values():
                x, blocks = collect(spy, layer, call, modality, items, inputs, site)
                if blocks:
                    received = torch.block_diag(*blocks).sum(0)
                    expected[call, layer] += normalised(received @ x / received.sum()) / 3
    bridge = ml.wrap(model)
    case = (bridge, inputs, masks_of(bridge, inputs))
    found = mine(case, site=site, metrics=("attended",))
    torch.testing.assert_close(found.values[0], expected, atol=1e-5, rtol=0)
    free = mine(case, site=site, metrics=FREE)
    torch.testing.assert_close(free.values, mine(case, site=site).values[:3], atol=1e-6, rtol=0)


def test_without_attention_nothing_of_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model whose queries and keys no hook hands out is mined all the same."""
    monkeypatch.setattr(
        attention, "_hooked", lambda _, function, __, *given, **named: function(*given, **named)
    )
    bridge, inputs = ml.wrap(towers.vision_model()), towers.vision_inputs()
    case = (bridge, inputs, masks_of(bridge, inputs))
    for metrics in (kernels.METRICS, ("attended",)):
        with pytest.raises(RuntimeError, match=r"metrics=\(\"prob\", \"mean\", \"max\"\)"):
            mine(case, metrics=metrics)
    scores = mine(case, metrics=FREE)
    assert scores.metrics == FREE
    assert "attention" not in scores.info
    analyzer = ml.ImportanceAnalyzer(metrics=FREE)
    assert not analyzer.needs()


def test_settings_and_merging(small: Any, tmp_path: Path) -> None:
    free, causal = (ml.ImportanceAnalyzer(a, metrics=FREE) for a in ("bidirectional", "causal"))
    assert free.settings == causal.settings  # of attention that counts for nothing
    with pytest.raises(ValueError, match="do not measure the same"):
        free + ml.ImportanceAnalyzer()
    scores = mine(small, metrics=FREE)
    scores.save(tmp_path / "scores.safetensors")
    again = ml.ImportanceScores.load(tmp_path / "scores.safetensors")
    assert again.metrics == FREE
    assert torch.equal(again.values, scores.values)
    with pytest.raises(ValueError, match="different metrics"):
        scores + mine(small)


@pytest.mark.parametrize(
    ("metrics", "message"),
    [
        ("mean", "must be a tuple of names, not 'mean'"),
        ((), "must be a tuple of names"),
        (("mean", "median"), "no metric 'median'; there are prob, mean, max, attn_k, attn_q, att"),
        (("mean", "mean"), "named twice: mean, mean"),
    ],
)
def test_metrics_that_are_none(metrics: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ml.ImportanceAnalyzer(metrics=metrics)


def test_weights_where_nothing_is_said(small: Any) -> None:
    published = dict(zip(kernels.METRICS, select.DEFAULT_WEIGHTS, strict=True))
    assert select.default_weights(kernels.METRICS) == {m: w for m, w in published.items() if w}
    assert select.default_weights(kernels.ALL_METRICS) == {"mean": 0.25, "max": 0.25, "attn_k": 0.5}
    mixed = {"mean": 0.25, "max": 0.25, "attended": 0.5}
    assert select.default_weights(("prob", "mean", "max", "attended")) == mixed
    assert select.default_weights(("prob",)) == {"prob": 1.0}
    assert select.default_weights(("attribution",)) == {"attribution": 1.0}
    scores = mine(small, metrics=FREE)
    by_hand = scores.select(0.2, weights=(0, 0.75, 0.25))
    assert scores.select(0.2) == by_hand

"""Attention beside the mean: by the definition, within its bounds, and as a result."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from torch import Tensor

import miner_lens as ml
from miner_lens.analyzers.attention_bound import AttentionBoundAnalyzer
from miner_lens.experiments.attention_effect import beside_mean
from miner_lens.scoring.attention_bound import moved_weight, score_bound
from tests import towers
from tests.models.test_sites import masks_of


@pytest.fixture(scope="module")
def found(shapes: Any) -> ml.experiments.AttentionEffect:
    data = ml.datasets.load("easy-vqa", limit=12, ask="both")
    return ml.experiments.attention_effect(shapes, data, batch_size=4, progress=False)


def test_bounds_are_of_the_attention_that_there_is() -> None:
    """By hand, of the patterns and activations of each sample, in fp64."""
    model, inputs = ml.wrap(towers.vision_model()), towers.vision_inputs()
    masks = masks_of(model, inputs)
    seen: dict[str, Tensor] = {}

    def keep(x: Tensor, hook: Any) -> None:
        seen[hook.name] = x.detach().double()

    points = [f"blocks.1.{part}" for part in ("attn.hook_pattern", "mlp.act.hook_out")]
    with torch.no_grad(), model.hooks(fwd_hooks=[(name, keep) for name in points]):
        model.original_model(**inputs)
    patterns, activations = (seen[name] for name in points)
    bound = ml.run(model, [(inputs, masks)], AttentionBoundAnalyzer("causal"), progress=False)
    for place, (name, mask) in enumerate(masks.items()):
        rows = []
        for sample in mask.any(1).nonzero()[:, 0].tolist():
            own = mask[sample]
            attention = patterns[sample].mean(0)[own][:, own]
            x, tokens = activations[sample, own], len(attention)
            equal = torch.full((tokens,), 1 / tokens, dtype=torch.float64)
            by_key = (attention.softmax(0).sum(1) / tokens - equal).abs().sum() / 2
            by_query = (attention.softmax(1).sum(0) / tokens - equal).abs().sum() / 2
            limit = moved_weight(torch.tensor(float(tokens)).double(), attention.max())
            means, widest = x.mean(0), (x.amax(0) - x.amin(0)).max()
            scores = score_bound(limit, widest, means.max() - means.min())
            rows.append(torch.stack([attention.max(), by_key, by_query, limit, scores]))
        if not rows:
            assert not bound.moved_bound[place].any(), name
            continue
        largest, by_key, by_query, limit, scores = torch.stack(rows).unbind(1)
        own_columns = [
            (bound.largest[place, 1], largest.max()),
            (bound.moved[0, place, 1], by_key.mean()),
            (bound.moved[1, place, 1], by_query.mean()),
            (bound.moved_bound[place, 1], limit.mean()),
            (bound.score_bound[place, 1], scores.sum() / len(inputs["input_ids"])),
        ]
        for value, expected in own_columns:
            torch.testing.assert_close(value.double(), expected, atol=1e-5, rtol=1e-4)
    assert "attention up to" in repr(bound)


def test_scores_are_within_their_bounds(found: ml.experiments.AttentionEffect) -> None:
    table = found.frame
    assert set(table["modality"]) == {"text", "special", "special_text", "image", "prompt"}
    assert len(table) == 2 * 5 * 6
    assert (table["distance"] <= table["score_bound"] + 1e-6).all()
    assert (table["moved"] <= table["moved_bound"] + 1e-6).all()
    assert table["correlation"].between(0.99, 1 + 1e-9).all()
    assert table["distance"].max() > 0


def test_the_result_reads_itself(found: Any, tmp_path: Path) -> None:
    sets = found.info["sets"]
    assert sets["image"]["neurons"] == 15
    assert f"image {sets['image']['shared']} of 15" in found.summary
    assert f"{found.frame['distance'].max():.4f}" in found.summary
    assert repr(found).startswith("AttentionEffect(60 rows)\nattn_k correlates")
    lines = found.figure().axes[0].get_lines()
    image = found.frame.query("metric == 'attn_k' and modality == 'image'")
    (drawn,) = [line for line in lines if line.get_label() == "image"]
    assert drawn.get_ydata().tolist() == image["distance"].tolist()
    found.save(tmp_path / "found.safetensors")
    again = ml.experiments.AttentionEffect.load(tmp_path / "found.safetensors")
    pd.testing.assert_frame_equal(again.frame, found.frame)
    assert again.summary == found.summary
    with pytest.raises(ValueError, match="holds AttentionEffect, not ImportanceScores"):
        ml.ImportanceScores.load(tmp_path / "found.safetensors")


def test_scores_without_attention_are_refused() -> None:
    scores = ml.ImportanceScores(torch.rand(1, 1, 2, 3), ["image"], metrics=("mean",))
    with pytest.raises(ValueError, match=r"no prob, only mean\. Mine with all"):
        beside_mean(scores)


def test_an_attention_that_is_none() -> None:
    with pytest.raises(ValueError, match="'bidirectional' or 'causal'"):
        AttentionBoundAnalyzer("sideways")  # type: ignore[arg-type]

"""Contribution and kinds of neurons, against their definitions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import miner_lens as ml
from miner_lens.models import access
from miner_lens.scoring.kinds import kind_shares


@pytest.fixture(scope="module")
def samples() -> list[ml.Sample]:
    return list(ml.datasets.load("easy-vqa", limit=7, ask="both"))


def activations(model: Any, sample: ml.Sample) -> tuple[Tensor, dict[str, Tensor]]:
    """[layer pos neuron], and masks [pos]."""
    inputs = ml.inputs(model, sample.messages)
    names = [point.name for point in ml.activation_points(model)]
    ids = inputs.pop("input")
    _, cache = model.run_with_cache(ids, names_filter=names, **inputs)
    masks = {name: mask[0] for name, mask in access.layout(model).masks(ids).items()}
    return torch.stack([cache[name][0] for name in names]), masks


@pytest.mark.parametrize("centred", [False, True])
def test_contribution(shapes: Any, samples: Any, centred: bool) -> None:
    scores = ml.run(
        shapes,
        samples,
        ml.ContributionAnalyzer(centred=centred),
        batch_size=4,
        progress=False,
    )
    assert scores.metrics == ("contribution", "contribution_at")
    hf_model = shapes.original_model
    unembedding = hf_model.get_output_embeddings().weight
    expected: dict[str, Any] = {}
    for sample in samples:
        x, masks = activations(shapes, sample)
        (token, *_) = shapes.processor.tokenizer(sample.answers[0], add_special_tokens=False)[
            "input_ids"
        ]
        row = unembedding[token] - (unembedding.mean(0) if centred else 0)
        favours = torch.stack([row @ layer.down.weight for layer in access.mlps(shapes)])
        for modality, mask in masks.items():
            if mask.any():
                both = [x[:, -1] * favours, x[:, mask].mean(1) * favours]
                expected[modality] = expected.get(modality, 0) + torch.stack(both)
    assert "image" in expected
    for modality, total in expected.items():
        torch.testing.assert_close(scores[modality], total / len(samples), atol=1e-5, rtol=1e-4)
    chosen = scores.select(0.01)["image"]
    best = scores["image"][0].flatten().topk(len(chosen)).indices
    assert set(chosen.mask.flatten().nonzero()[:, 0].tolist()) == set(best.tolist())


def test_contribution_cannot_be(shapes: Any, samples: Any) -> None:
    with pytest.raises(RuntimeError, match="has no answer, so nothing can contribute"):
        ml.run(shapes, [ml.Sample(samples[0].messages)], ml.ContributionAnalyzer(), progress=False)
    with pytest.raises(ValueError, match="No sample has been seen"):
        ml.ContributionAnalyzer().result()


def test_quantized_weights_are_refused(shapes: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from miner_lens.analyzers import contribution

    monkeypatch.setattr(contribution, "has_weight", lambda part: False)
    with pytest.raises(ValueError, match="quantized or offloaded"):
        ml.ContributionAnalyzer().begin(shapes)


def kinds_by_hand(model: Any, samples: list[ml.Sample], top: int) -> tuple[Tensor, Tensor]:
    """Two passes, as published: the highest of each neuron first, then counts.

    And where samples tie at the cut, as those do that begin alike: which of them counts is drawn.
    """
    seen = [activations(model, sample) for sample in samples]
    highest = torch.stack([x.amax(1) for x, _ in seen]).amax(0)
    rank, by_image, by_text = [], [], []
    for x, masks in seen:
        scaled = (x / highest[:, None] * 10).clamp(min=0)
        by_image.append((scaled[:, masks["image"]] > 2).sum(1) >= 4)
        by_text.append((scaled[:, masks["text"]] > 3).sum(1) >= 2)
        rank.append(x[:, masks["image"] | masks["text"]].amax(1))
    values, chosen = torch.stack(rank).sort(0, descending=True)
    tied = (values[top - 1] - values[top]) < 1e-4
    chosen = chosen[:top]
    image, text = (torch.stack(one).gather(0, chosen) for one in (by_image, by_text))
    kinds = [image & ~text, text & ~image, image & text, ~image & ~text]
    return torch.stack([kind.float().mean(0) for kind in kinds]), tied


@pytest.mark.parametrize("batch_size", [1, 3])
def test_kinds(shapes: Any, samples: Any, batch_size: int, tmp_path: Path) -> None:
    kinds = ml.run(shapes, samples, ml.KindAnalyzer(top=4), batch_size=batch_size, progress=False)
    expected, tied = kinds_by_hand(shapes, samples, 4)
    assert kinds.kinds == ("image", "text", "multimodal", "unknown")
    # Thresholds may fall on either side of a last bit.
    different = (kinds.shares - expected).abs().amax(0) > 1e-6
    assert different[~tied].float().mean() < 0.002
    assert tied.float().mean() < 0.2
    assert (expected.amax(2).amax(1) > 0).all()
    chosen = kinds.select()
    assert sum(map(len, chosen.values())) == expected[0].numel()
    assert len(kinds.select(least=1.0)["text"]) < len(chosen["text"])
    kinds.save(tmp_path / "kinds.safetensors")
    loaded = ml.NeuronKinds.load(tmp_path / "kinds.safetensors")
    assert repr(loaded) == repr(kinds)
    assert torch.equal(loaded.shares, kinds.shares)
    scores = kinds.to_scores()
    assert torch.equal(scores["image"][0], kinds.shares[0])
    assert len(scores.select(0.01)["image"]) == int(0.01 * expected[0].numel()) // 2


def test_kinds_in_halves(shapes: Any, samples: Any) -> None:
    one, two = ml.KindAnalyzer(), ml.KindAnalyzer()  # all samples are among the first 50
    options: dict[str, Any] = {"progress": False, "batch_size": 1}
    ml.run(shapes, samples[:3], one, **options)
    ml.run(shapes, samples[3:], two, **options)
    merged = (one + two).result().shares
    assert torch.equal(merged, ml.run(shapes, samples, ml.KindAnalyzer(), **options).shares)


def test_neurons_that_never_fire_and_few_samples() -> None:
    none = torch.full((1, 2, 3), -torch.inf)
    tops = none.clone()
    tops[0, 0] = torch.tensor([-0.1, 0.0, 4.0])
    high = torch.tensor([[-0.1, 0.0, 4.0]])
    reached = torch.tensor([-0.1, 0.0, 4.0]).expand(1, 2, 3)
    shares = kind_shares(tops, reached, reached, high)
    assert shares[:, 0].T.tolist() == [[0, 0, 0, 1], [0, 0, 0, 1], [0, 0, 1, 0]]


def test_kinds_cannot_be(shapes: Any, samples: Any) -> None:
    with pytest.raises(RuntimeError, match="know of no modality 'smell'"):
        ml.run(shapes, samples[:1], ml.KindAnalyzer("smell"), progress=False)
    with pytest.raises(ValueError, match="top must be at least 1"):
        ml.KindAnalyzer(top=0)
    with pytest.raises(ValueError, match="No sample has been seen"):
        ml.KindAnalyzer().result()
    kinds = ml.run(shapes, samples[:2], ml.KindAnalyzer(top=1), progress=False)
    with pytest.raises(ValueError, match="must lie in 0 to 1"):
        kinds.select(least=2.0)

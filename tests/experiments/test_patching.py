"""Activation patching, against what must come back and what hooks by hand give."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import miner_lens as ml
from miner_lens.models import access


@pytest.fixture(scope="module")
def pairs() -> list[Any]:
    found = ml.counterfactuals(ml.datasets.load("easy-vqa", limit=150), limit=3)
    assert len(found) == 3
    return found


def test_counterfactuals(pairs: Any) -> None:
    for one, other in pairs:
        assert one.messages[0]["content"][1] == other.messages[0]["content"][1]
        assert one.answers != other.answers
    assert len({sample.id for pair in pairs for sample in pair}) == 6
    assert not ml.counterfactuals([one for one, _ in pairs[:1]])


def difference(model: Any, sample: ml.Sample, pair: Any) -> float:
    tokens = [model.processor.tokenizer(s.answers[0]).input_ids[0] for s in pair]
    with torch.no_grad():
        logits = model(**ml.inputs(model, sample.messages))[0, -1]
    return float(logits[tokens[0]] - logits[tokens[1]])


def test_residual_streams(shapes: Any, pairs: Any, tmp_path: Path) -> None:
    found = ml.activation_patching(shapes, pairs, progress=False)
    assert {name for name, _ in found.what} == {"text", "special", "image", "last"}
    for place, pair in enumerate(pairs):
        assert float(found.clean[place]) == pytest.approx(
            difference(shapes, pair[0], pair), abs=1e-4
        )
        assert float(found.corrupted[place]) == pytest.approx(
            difference(shapes, pair[1], pair), abs=1e-4
        )
    # After the last layer only the last token counts, and it is the clean prompt's then.
    torch.testing.assert_close(
        found.patched[found.what.index(("last", 5))], found.clean, atol=1e-4, rtol=1e-4
    )
    torch.testing.assert_close(
        found.patched[found.what.index(("image", 5))], found.corrupted, atol=1e-4, rtol=1e-4
    )

    one, other = pairs[0]
    inputs, against = (ml.inputs(shapes, sample.messages) for sample in (one, other))
    image = access.layout(shapes).masks(inputs["input"])["image"]
    layer, seen = shapes.original_model.get_decoder().layers[0], []
    handle = layer.register_forward_hook(lambda _, __, x: seen.append(x))
    shapes(**inputs)
    handle.remove()
    handle = layer.register_forward_hook(lambda _, __, x: torch.where(image[..., None], seen[0], x))
    by_hand = shapes(**against)[0, -1]
    handle.remove()
    tokens = [shapes.processor.tokenizer(s.answers[0]).input_ids[0] for s in pairs[0]]
    assert float(found.patched[found.what.index(("image", 0)), 0]) == pytest.approx(
        float(by_hand[tokens[0]] - by_hand[tokens[1]]), abs=1e-4
    )

    table = found.curves(resamples=50)
    row = table.query("modality == 'last' and layer == 5").squeeze()
    assert row["mean"] == pytest.approx(1, abs=1e-4)
    assert row["low"] <= row["mean"] + 1e-6
    found.save(tmp_path / "patching.safetensors")
    loaded = ml.Patching.load(tmp_path / "patching.safetensors")
    assert repr(loaded) == repr(found)
    assert loaded.curves(resamples=50).equals(table)


def test_neurons(shapes: Any, pairs: Any) -> None:
    few = ml.NeuronSet.of([(2, n) for n in range(120)], shapes)
    sets = {"few": few, "every": ~ml.NeuronSet.of([], shapes), "none": few & ~few}
    found = ml.activation_patching(shapes, pairs, sets, progress=False)
    assert found.what == (("few", -1), ("every", -1), ("none", -1))
    torch.testing.assert_close(found.patched[2], found.corrupted, atol=1e-5, rtol=0)
    moved = (found.patched - found.corrupted).abs().amax(1)
    assert moved[0] > 1e-5
    assert moved[1] > moved[0]


def test_what_cannot_be(shapes: Any, pairs: Any) -> None:
    one, other = pairs[0]
    longer = ml.datasets.load("easy-vqa", limit=1, ask="text")[0]
    for given, message in (
        ([], "There is no pair"),
        ([(one, longer)], "in the same places"),
        ([(one, one)], "begin with the same token"),
        ([(one, ml.Sample(other.messages, (), "silent"))], "silent has no answer"),
    ):
        with pytest.raises(ValueError, match=message):
            ml.activation_patching(shapes, given, progress=False)
    vision = {"a": ml.NeuronSet.of([(0, 0)], shapes, "vision")}
    with pytest.raises(ValueError, match="of site 'vision'"):
        ml.activation_patching(shapes, pairs, vision, progress=False)
    with pytest.raises(ValueError, match="at least two pairs"):
        ml.activation_patching(shapes, pairs[:1], progress=False).curves()

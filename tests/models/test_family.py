"""What a check of a model family finds, and that it finds faults."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

import miner_lens as ml
from miner_lens.models import bridge as bridges
from miner_lens.models import sites
from miner_lens.models.family import FamilyReport
from tests.models.test_inside import llama_model, shape_of

NAMES = ["logits", "hooks", "neurons", "layout", "generation"]


@pytest.fixture
def plain() -> Any:
    path = ml.organisms.path("shapes")
    model = AutoModelForImageTextToText.from_pretrained(path).eval()
    model.processor = AutoProcessor.from_pretrained(path)
    return model


def failed(report: FamilyReport) -> dict[str, str]:
    assert [check.name for check in report.checks] == NAMES
    assert report.passed == all(check.passed for check in report.checks)
    return {check.name: check.says for check in report.checks if not check.passed}


@pytest.mark.parametrize("organism", ["shapes", "speech"])
def test_families_that_ship_pass(organism: str) -> None:
    report = ml.check_family(ml.load(organism, device="cpu"))
    assert report.passed, report
    assert str(report).count("equal to the last bit") == 3


def test_plain_models_stay_plain(plain: Any) -> None:
    before = shape_of(plain)
    assert ml.check_family(plain).passed
    assert shape_of(plain) == before


def test_bridges_stay_as_they_are(shapes: Any) -> None:
    message = [{"role": "user", "content": [{"type": "text", "text": "what color is it?"}]}]
    report = ml.check_family(shapes, message)
    assert report.passed, report
    assert "of towers that did not run" in str(report)
    assert ml.generate(shapes, message, 2)


def test_a_layout_with_another_placeholder(plain: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    other = ml.ModalityLayout({"image": 10**6}, frozenset({2}))
    monkeypatch.setattr(bridges, "layout_for", lambda *_: other)
    assert failed(ml.check_family(plain)) == {
        "layout": "The conversation has image, but no token of it is found."
    }
    monkeypatch.setattr(bridges, "layout_for", lambda *_: None)
    monkeypatch.setattr("miner_lens.models.access.layout_for", lambda *_: None)
    assert "ValueError: No modality layout is known" in failed(ml.check_family(plain))["layout"]


def test_an_adapter_that_changes_the_model(plain: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    wrap = bridges.wrap

    def wrong(model: Any, processor: Any, **options: Any) -> Any:
        bridge = wrap(model, processor, **options)
        norm = bridge.blocks[1].ln1.original_component
        norm.register_forward_hook(lambda _, args, output: output * 1.5)
        return bridge

    monkeypatch.setattr("miner_lens.models.family.wrap", wrong)
    assert {"logits", "hooks"} <= failed(ml.check_family(plain)).keys()


def test_hook_points_in_the_wrong_place(plain: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        sites.Decoder, "activation_point", lambda self, layer: f"blocks.{layer}.mlp.hook_in"
    )
    found = failed(ml.check_family(plain))
    assert "neurons are expected" in found["hooks"]
    monkeypatch.setattr(sites.Decoder, "activation_point", lambda self, layer: f"none.{layer}")
    assert failed(ml.check_family(plain))["hooks"] == "There is no hook point none.0."


def test_text_models(shapes: Any) -> None:
    """TransformerLens rebuilds the attention of this one, so its logits are close."""
    tokenizer = copy.deepcopy(shapes.processor.tokenizer)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    model: Any = llama_model()
    model.resize_token_embeddings(len(tokenizer))
    model.processor = tokenizer
    report = ml.check_family(model)
    assert set(failed(report)) == {"layout"}
    assert "rebuilds" in str(report) or "last bit" in str(report)
    with pytest.raises(ValueError, match="has no processor"):
        ml.check_family(llama_model())


def test_dtypes(plain: Any) -> None:
    assert ml.check_family(plain.to(torch.bfloat16)).passed

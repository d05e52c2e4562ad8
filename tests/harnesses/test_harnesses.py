"""Harnesses' own model classes under an ablation; those of harnesses that are installed."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import AutoProcessor, LlamaConfig, LlamaForCausalLM

import miner_lens as ml
from miner_lens.harnesses import ablated
from tests.towers import TEXT


class Asked:
    """A harness's model, as VLMEvalKit writes them."""

    def __init__(self, model_path: str) -> None:
        self.processor = AutoProcessor.from_pretrained(model_path)
        self.model = ml.load(model_path, device="cpu").original_model

    def generate(self, message: list[dict[str, Any]]) -> str:
        return self.generate_inner(message)

    def generate_inner(self, message: list[dict[str, Any]]) -> str:
        self.model.processor = self.processor
        return str(ml.generate(self.model, message, 3))


@pytest.fixture(scope="module")
def shapes_path() -> str:
    return str(ml.organisms.path("shapes"))


OPTIONS: list[dict[str, Any]] = [{}, {"value": "0.7", "at": "text"}, {"value": "min"}]


def hooks_of(model: Any) -> list[int]:
    return [len(module._forward_hooks) for module in model.modules()]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_any_model_class(
    shapes: Any, shapes_path: str, options: dict[str, Any], tmp_path: Path
) -> None:
    neurons = ~ml.NeuronSet.of([(0, 1)], shapes)
    neurons.save(tmp_path / "neurons.safetensors")
    neurons.save_pretrained(tmp_path / "folder")
    (sample,) = ml.datasets.load("easy-vqa", limit=1)
    intact = ml.generate(shapes, sample.messages, 3)
    number = options | ({"value": 0.7} if "at" in options else {})
    with ml.ablate(shapes, neurons, **number):
        expected = ml.generate(shapes, sample.messages, 3)
    assert expected != intact
    kind = ablated(Asked, ["generate_inner", "chat_inner"])
    assert not hasattr(kind, "chat_inner")
    written = [str(tmp_path / "neurons.safetensors"), str(tmp_path / "folder")]
    for given in [neurons] if options else written:
        model = kind(shapes_path, neurons=given, **options)
        before = hooks_of(model.model)
        assert model.generate(sample.messages) == expected
        assert hooks_of(model.model) == before
    foreign = ml.NeuronSet([(0, 1)], layers=1, neurons=2)
    with pytest.raises(ValueError, match="1 layers x 2 neurons"):
        kind(shapes_path, neurons=foreign)


def test_vlmeval(shapes: Any, shapes_path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its list of models is a dict of partial classes."""
    from miner_lens.harnesses.vlmeval import register

    config = ModuleType("vlmeval.config")
    config.supported_VLM = {"shapes": partial(Asked, model_path=shapes_path)}  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vlmeval", ModuleType("vlmeval"))
    monkeypatch.setitem(sys.modules, "vlmeval.config", config)
    neurons = ~ml.NeuronSet.of([(0, 1)], shapes)
    name = register("shapes", neurons, at="text")
    assert name == "shapes-ablated"
    (sample,) = ml.datasets.load("easy-vqa", limit=1)
    with ml.ablate(shapes, neurons, at="text"):
        expected = ml.generate(shapes, sample.messages, 3)
    assert config.supported_VLM[name]().generate(sample.messages) == expected


def text_model(folder: Path, shapes_path: str) -> str:
    tokenizer = AutoProcessor.from_pretrained(shapes_path).tokenizer
    tokenizer.save_pretrained(folder)
    torch.manual_seed(7)
    config = LlamaConfig(**TEXT | {"vocab_size": len(tokenizer)})
    LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


def test_lm_eval(shapes_path: str, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance
    from lm_eval.api.registry import get_model
    from lm_eval.models.huggingface import HFLM

    import miner_lens.harnesses.lm_eval as harness

    path = text_model(tmp_path / "model", shapes_path)
    pairs = [("what color is the shape?", " red"), ("is it", " a circle")]
    asked = [
        Instance(request_type="loglikelihood", doc={}, arguments=pair, idx=i)
        for i, pair in enumerate(pairs)
    ]
    plain = HFLM(pretrained=path, device="cpu")
    neurons = ~ml.NeuronSet.of([(0, 1)], plain.model)
    neurons.save(tmp_path / "neurons.safetensors")
    intact = plain.loglikelihood(asked, disable_tqdm=True)
    with ml.ablate(plain.model, neurons, value=0.5):
        expected = plain.loglikelihood(asked, disable_tqdm=True)
    assert get_model("hf-ablated") is harness.AblatedHF
    assert get_model("hf-multimodal-ablated") is harness.AblatedMultimodal
    arguments = f"pretrained={path},neurons={tmp_path}/neurons.safetensors,value=0.5"
    model = get_model("hf-ablated").create_from_arg_string(arguments, {"device": "cpu"})
    assert model.loglikelihood(asked, disable_tqdm=True) == expected
    assert expected != intact


def test_lmms_eval(shapes: Any, shapes_path: str) -> None:
    pytest.importorskip("lmms_eval")
    from lmms_eval import models
    from lmms_eval.api.model import lmms

    from miner_lens.harnesses.lmms_eval import manifests

    class Shapes(Asked, lmms):
        def __init__(self, pretrained: str, **options: Any) -> None:
            lmms.__init__(self)
            Asked.__init__(self, pretrained)

        def generate_until(self, requests: Any) -> list[str]:
            return [self.generate(request) for request in requests]

        def generate_until_multi_round(self, requests: Any) -> Any:
            raise NotImplementedError

        def loglikelihood(self, requests: Any) -> Any:
            raise NotImplementedError

    known = {manifest.model_id for manifest in manifests()}
    assert {"qwen2_vl-ablated", "qwen2_audio-ablated", "llava_hf-ablated"} <= known
    home = ModuleType("home")
    home.Shapes = Shapes  # type: ignore[attr-defined]
    sys.modules["home"] = home
    models.MODEL_REGISTRY_V2.register_manifest(
        models.ModelManifest("shapes", simple_class_path="home.Shapes")
    )
    path = "miner_lens.harnesses.lmms_eval.simple_shapes"
    models.MODEL_REGISTRY_V2.register_manifest(
        models.ModelManifest("shapes-ablated", simple_class_path=path)
    )
    neurons = ~ml.NeuronSet.of([(0, 1)], shapes)
    (sample,) = ml.datasets.load("easy-vqa", limit=1)
    with ml.ablate(shapes, neurons, "min", at="image"):
        expected = ml.generate(shapes, sample.messages, 3)
    kind = models.get_model("shapes-ablated")
    model = kind(pretrained=shapes_path, neurons=neurons, value="min", at="image")
    assert model.generate_until([sample.messages]) == [expected]

"""Gradients in a pass, and attribution, against autograd on plain Hugging Face."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import miner_lens as ml
from miner_lens.models import access

SITES = ("llm", "vision")


@pytest.fixture(scope="module")
def samples() -> list[ml.Sample]:
    """Of both kinds, of unequal length."""
    pictures = list(ml.datasets.load("easy-vqa", limit=6, ask="image"))
    sentences = list(ml.datasets.load("easy-vqa", limit=5, ask="text"))
    return [one for pair in zip(pictures, sentences, strict=False) for one in pair]


def attribute(model: Any, samples: Any, **options: Any) -> ml.ImportanceScores:
    return ml.attribute(model, samples, **({"progress": False, "batch_size": 4} | options))


def twin(
    model: Any, samples: list[ml.Sample], site: str = "llm", objective: Any = None
) -> dict[str, Tensor]:
    """Effects [layer neuron] by modality, one sample at a time, from the definition."""
    hf_model, tokenizer = model.original_model, model.processor.tokenizer
    totals: dict[str, Tensor] = {}
    for sample in samples:
        inputs = ml.inputs(model, sample.messages)
        prompt = inputs.pop("input")
        answer = tokenizer(sample.answers[0], add_special_tokens=False).input_ids
        ids = prompt if objective else torch.cat([prompt, torch.tensor([answer])], 1)
        inputs |= {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if "mm_token_type_ids" in inputs:
            inputs["mm_token_type_ids"] = (ids == hf_model.config.image_token_id).int()
        seen: list[Tensor] = []

        def keep(module: Any, args: Any, x: Tensor, seen: list[Tensor] = seen) -> None:
            x.retain_grad()
            seen.append(x)

        handles = [mlp.activation.register_forward_hook(keep) for mlp in access.mlps(model, site)]
        hf_model.requires_grad_(True)
        with torch.enable_grad():
            logits = hf_model(**inputs).logits[0]
            if objective:
                value = objective(logits[None], None).sum()
            else:
                log_probs = logits[len(prompt[0]) - 1 : -1].log_softmax(-1)
                value = sum(row[token] for row, token in zip(log_probs, answer, strict=True))
            value.backward()
        hf_model.zero_grad()
        for handle in handles:
            handle.remove()
        masks = access.layout(model).masks(prompt)
        if site != "llm":
            masks = {"image": torch.ones(1, len(seen[0]), dtype=torch.bool)} if seen else {}
        for modality, mask in masks.items():
            length = mask.shape[1]
            effects = [
                (x.flatten(0, -2)[:length] * x.grad.flatten(0, -2)[:length])[mask[0]].sum(0)
                for x in seen
                if x.grad is not None
            ]
            totals[modality] = totals.get(modality, 0.0) + torch.stack(effects).detach().double()
    return {modality: (total / len(samples)).float() for modality, total in totals.items()}


@pytest.mark.parametrize("batch_size", [1, 4, "auto"])
def test_it_equals_its_definition(shapes: Any, samples: Any, batch_size: Any) -> None:
    scores = attribute(shapes, samples, batch_size=batch_size)
    assert scores.metrics == ("attribution",)
    assert scores.values.min() < 0 < scores.values.max()
    expected = twin(shapes, samples)
    assert {"image", "text", "special", "prompt"} <= expected.keys()
    for modality, effects in expected.items():
        torch.testing.assert_close(scores[modality][0], effects, atol=1e-6, rtol=1e-5)


def test_in_a_tower(shapes: Any, samples: Any) -> None:
    pictures = samples[::2]
    scores = attribute(shapes, pictures, site="vision")
    expected = twin(shapes, pictures, "vision")
    torch.testing.assert_close(scores["image"][0], expected["image"], atol=1e-6, rtol=1e-5)
    assert scores.site == "vision"
    assert scores.occurrences[scores.modalities.index("image")] == len(pictures)


def test_it_predicts_what_a_small_step_does(shapes: Any, samples: Any) -> None:
    """The effect of scaling a neuron down a little, measured."""

    def objective(logits: Tensor, batch: Any) -> Tensor:
        return logits[:, -1, 100]

    effects = attribute(shapes, samples[:1], objective=objective)["image"][0]
    layer, neuron = divmod(int(effects.abs().argmax()), effects.shape[1])
    inputs = ml.inputs(shapes, samples[0].messages)
    image = access.layout(shapes).masks(inputs["input"])["image"]
    step = 0.02

    def shrink(module: Any, args: Any, x: Tensor) -> Tensor:
        return torch.where(image[..., None], x.index_fill(2, torch.tensor(neuron), 0.0), x) * (
            step
        ) + x * (1 - step)

    def value() -> float:
        with torch.no_grad():
            return float(objective(shapes(**inputs), None))

    before = value()
    handle = access.mlps(shapes)[layer].activation.register_forward_hook(shrink)
    lost = before - value()
    handle.remove()
    assert abs(lost) > 1e-4
    assert lost == pytest.approx(step * float(effects[layer, neuron]), rel=0.05)


def test_other_analyzers_of_the_pass_see_the_prompt_alone(shapes: Any, samples: Any) -> None:
    options: dict[str, Any] = {"progress": False, "batch_size": 4}
    alone = ml.mine(shapes, samples, **options)
    beside, effects = ml.run(
        shapes, samples, ml.ImportanceAnalyzer(), ml.AttributionAnalyzer(), **options
    )
    torch.testing.assert_close(beside.values, alone.values, atol=1e-6, rtol=0)
    torch.testing.assert_close(beside.means, alone.means, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(effects.means, alone.means, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(effects.values, attribute(shapes, samples).values)


def entropy(logits: Tensor, batch: Any) -> Tensor:
    log_probs = logits[:, -1].float().log_softmax(-1)
    return -(log_probs.exp() * log_probs).sum(-1)


def test_another_objective(shapes: Any, samples: Any) -> None:
    scores = attribute(shapes, samples, objective=entropy)
    for modality, effects in twin(shapes, samples, objective=entropy).items():
        torch.testing.assert_close(scores[modality][0], effects, atol=1e-6, rtol=1e-4)


def test_inside_an_ablation(shapes: Any, samples: Any) -> None:
    """What is off already does nothing, and the others are seen as they are then."""
    before = attribute(shapes, samples)
    off = before.select(0.05)["text"]
    with ml.ablate(shapes, off):
        inside = attribute(shapes, samples)
        expected = twin(shapes, samples)
    assert not inside.values[:, :, off.mask].any()
    torch.testing.assert_close(inside["text"][0], expected["text"], atol=1e-6, rtol=1e-5)
    assert (inside["text"] - before["text"]).abs().max() > 1e-4


def test_the_model_is_as_before(shapes: Any, samples: Any) -> None:
    hf_model = shapes.original_model
    hf_model.requires_grad_(False)
    trained = hf_model.get_decoder().layers[0].requires_grad_(True)
    hf_model.zero_grad()
    attribute(shapes, samples[:2])
    learning = [parameter for parameter in hf_model.parameters() if parameter.requires_grad]
    assert len(learning) == len(list(trained.parameters()))
    assert all(parameter.grad is None for parameter in hf_model.parameters())
    assert not any(m._forward_pre_hooks for m in hf_model.get_input_embeddings().modules())


def test_halves_and_a_run_that_goes_on(shapes: Any, samples: Any, tmp_path: Path) -> None:
    whole = attribute(shapes, samples)
    halves = attribute(shapes, samples[:5]) + attribute(shapes, samples[5:])
    torch.testing.assert_close(halves.values, whole.values, atol=1e-6, rtol=1e-5)
    options: dict[str, Any] = {"checkpoint": tmp_path, "checkpoint_every_samples": 1}

    def broken() -> Any:
        yield from samples[:4]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        attribute(shapes, broken(), batch_size=1, **options)
    continued = attribute(shapes, samples, batch_size=1, **options)
    assert torch.equal(continued.values, attribute(shapes, samples, batch_size=1).values)
    with pytest.raises(ValueError, match="another run"):
        attribute(shapes, samples, batch_size=1, objective=entropy, checkpoint=tmp_path)


def test_scores_are_selected_and_saved_as_others(shapes: Any, samples: Any, tmp_path: Path) -> None:
    scores = attribute(shapes, samples)
    scores.save(tmp_path / "scores.safetensors")
    loaded = ml.ImportanceScores.load(tmp_path / "scores.safetensors")
    assert torch.equal(loaded.values, scores.values)
    chosen = loaded.select(0.02)
    best = scores["image"][0].flatten().topk(len(chosen["image"])).indices
    assert torch.equal(chosen["image"].mask.flatten().nonzero()[:, 0], best.sort().values)
    assert chosen["image"].means is not None


def test_what_cannot_be(shapes: Any, samples: Any) -> None:
    unanswered = ml.Sample(samples[0].messages, (), "unanswered")
    with pytest.raises(ValueError, match="unanswered has no answers"):
        attribute(shapes, [unanswered])
    assert attribute(shapes, [unanswered], objective=entropy).samples == 1
    with pytest.raises(ValueError, match="has an empty answer"):
        attribute(shapes, [ml.Sample(samples[0].messages, "")])
    inputs = ml.inputs(shapes, samples[0].messages)
    ids = inputs.pop("input")
    pair = ({**inputs, "input_ids": ids}, access.layout(shapes).masks(ids))
    with pytest.raises(ValueError, match="prepared pair, which has no answer"):
        attribute(shapes, [pair])
    assert attribute(shapes, [pair], objective=entropy).samples == 1
    with pytest.raises(ValueError, match="needs gradients, and run_with_hooks makes no backward"):
        ml.AttributionAnalyzer().hooks(shapes)
    with pytest.raises(ValueError, match="must return a tensor that has a gradient"):
        attribute(shapes, samples[:1], objective=lambda logits, batch: logits.detach().sum())
    with pytest.raises(ValueError, match="returned float"):
        attribute(shapes, samples[:1], objective=lambda logits, batch: 0.0)
    cut = shapes.original_model.get_decoder().layers[1]
    handle = cut.register_forward_hook(lambda module, args, x: x.detach().requires_grad_())
    with pytest.raises(RuntimeError, match=r"No gradient .* has come to blocks\.0\.mlp"):
        attribute(shapes, samples[:1])
    handle.remove()


def test_gradients_reach_no_tower_that_is_only_read(shapes: Any) -> None:
    data = ml.datasets.load("easy-vqa", limit=2)
    (point, *_) = ml.activation_points(shapes, "vision")
    reached: list[bool] = []

    def look(x: torch.Tensor, hook: Any) -> None:
        reached.append(x.requires_grad)

    for site, there in (("llm", False), ("vision", True)):
        analyzers = (ml.AttributionAnalyzer(site=site), ml.DomainAnalyzer("vision"))
        with shapes.hooks(fwd_hooks=[(point.name, look)]):
            ml.run(shapes, {"images": data}, *analyzers, batch_size=2, progress=False)
        assert reached.pop() is there
    assert not reached

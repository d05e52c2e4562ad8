"""Attention times gradient, against autograd by hand and finite differences."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import miner_lens as ml


@pytest.fixture(scope="module")
def samples() -> list[ml.Sample]:
    data = list(ml.datasets.load("easy-vqa", limit=3, ask="both"))
    return [*data, ml.Sample(data[0].messages, "yes it is", "longer")]


@pytest.fixture(scope="module")
def flow(shapes: Any, samples: Any) -> ml.AttentionFlow:
    return ml.run(shapes, samples, ml.AttentionFlowAnalyzer(), batch_size=4, progress=False)


def by_hand(shapes: Any, sample: ml.Sample) -> tuple[list[torch.Tensor], Any]:
    """Each layer's attention of the last token times its gradient, [head key], and the masks."""
    inputs = ml.inputs(shapes, sample.messages)
    tokenizer = shapes.processor.tokenizer
    (token,) = tokenizer(sample.answers[0], add_special_tokens=False)["input_ids"]
    seen: list[torch.Tensor] = []

    def keep(pattern: torch.Tensor, hook: Any) -> None:
        pattern.retain_grad()
        seen.append(pattern)

    hooks = [(point.name, keep) for point in ml.pattern_points(shapes)]
    with torch.enable_grad():
        logits = shapes.run_with_hooks(**inputs, fwd_hooks=hooks)
        logits[0, -1].log_softmax(-1)[token].backward()
    shapes.zero_grad(set_to_none=True)
    products = [(one * one.grad)[0, :, -1].detach() for one in seen]
    return products, shapes.modality_layout.masks(inputs["input"])


def test_it_is_attention_times_its_gradient(shapes: Any, samples: Any) -> None:
    products, masks = by_hand(shapes, samples[0])
    flow = ml.run(shapes, samples[:1], ml.AttentionFlowAnalyzer(), progress=False)
    assert flow.modalities == ("text", "special", "image", "video")
    for layer, product in enumerate(products):
        for modality in ("text", "image", "special"):
            mask = masks[modality][0].clone()
            mask[-1] = False
            edges = product[:, mask].sum(0)
            found = flow.of(modality)[0, layer]
            assert found == pytest.approx(edges.sum().item(), abs=1e-5)
            salient = flow.of(modality, "saliency")[0, layer]
            assert salient == pytest.approx(edges.abs().sum().item(), abs=1e-5)


def test_batches_and_long_answers(shapes: Any, samples: Any, flow: ml.AttentionFlow) -> None:
    assert flow.values.shape == (4, 6, 4, 2)
    alone = [
        ml.run(shapes, [one], ml.AttentionFlowAnalyzer(), progress=False).values for one in samples
    ]
    # Rows are kept in an order of their own.
    for one in alone:
        distance = (flow.values - one).abs().flatten(1).amax(1)
        assert distance.min() < 1e-4
    assert not torch.allclose(alone[0], alone[3], atol=1e-3)


def test_small_cuts_cost_what_it_says(shapes: Any, samples: Any) -> None:
    """Scaling down the pattern a little, by hand, loses so much of the log-probability."""
    sample, layer, small = samples[0], 3, 1e-2
    flow = ml.run(shapes, [sample], ml.AttentionFlowAnalyzer(), progress=False)
    inputs = ml.inputs(shapes, sample.messages)
    image = shapes.modality_layout.masks(inputs["input"])["image"][0]
    (token,) = shapes.processor.tokenizer(sample.answers[0], add_special_tokens=False)["input_ids"]
    attention = shapes.blocks[layer].attn
    seen: dict[str, torch.Tensor] = {}

    def read(x: torch.Tensor, hook: Any) -> None:
        seen[hook.name.rpartition(".")[2]] = x

    def values(x: torch.Tensor, hook: Any) -> None:
        seen["v"] = x

    names = [f"blocks.{layer}.attn.hook_pattern", f"blocks.{layer}.attn.v.hook_out"]
    with torch.no_grad():
        intact = shapes.run_with_hooks(**inputs, fwd_hooks=[(names[0], read), (names[1], values)])[
            0, -1
        ].double()
    pattern, value = seen["hook_pattern"], seen["v"]
    heads = pattern.shape[1]
    value = value.reshape(1, value.shape[1], -1, attention.original_component.head_dim)
    value = value.repeat_interleave(heads // value.shape[2], 2)
    taken = torch.einsum("hk,khd->hd", pattern[0, :, -1, image], value[0, image])

    def less(z: torch.Tensor, hook: Any) -> torch.Tensor:
        z = z.clone()
        z[0, -1] -= small * taken.reshape(z[0, -1].shape)
        return z

    with torch.no_grad():
        cut = shapes.run_with_hooks(**inputs, fwd_hooks=[(f"blocks.{layer}.attn.o.hook_in", less)])[
            0, -1
        ].double()
    lost = (intact.log_softmax(-1)[token] - cut.log_softmax(-1)[token]).item() / small
    assert flow.of("image")[0, layer].item() == pytest.approx(lost, rel=0.05, abs=1e-3)


def test_files_curves_and_ablation(
    shapes: Any, samples: Any, flow: ml.AttentionFlow, tmp_path: Path
) -> None:
    flow.save(tmp_path / "flow.safetensors")
    loaded = ml.AttentionFlow.load(tmp_path / "flow.safetensors")
    assert repr(loaded) == repr(flow)
    table = loaded.curves()
    assert table.equals(flow.curves())
    assert set(table["measure"]) == {"effect", "saliency"}
    assert list(flow.overview().columns) == ["text", "special", "image"]
    every = ~ml.NeuronSet.of([], shapes)
    with ml.ablate(shapes, every):
        without = ml.run(shapes, samples, ml.AttentionFlowAnalyzer(), batch_size=4, progress=False)
    assert not torch.allclose(without.values, flow.values, atol=1e-3)
    with pytest.raises(ValueError, match="nothing has flowed"):
        ml.AttentionFlowAnalyzer().result()
    with pytest.raises(KeyError, match="There is no 'smell' here"):
        flow.of("smell")

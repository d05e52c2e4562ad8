"""The small reference checkpoint: logits, scores, neuron sets and ablated logits.

The reference numbers come from a decoder that ran without its causal mask (plain transformers
gives them only when attention is a registered function without a registered mask), so they are
compared inside `attention.unmasked`. That the model itself is causal is tested in test_models.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import miner_lens as ml
from miner_lens import attention
from tests.reference import MODEL_INPUTS, load

SAMPLES = range(4)


@pytest.fixture(scope="module")
def expected() -> Any:
    return load("tiny_qwen2_vl/expected.npz")


def model_inputs(expected: Any, sample: int) -> dict[str, Any]:
    names = [name for name in MODEL_INPUTS if f"s{sample}_{name}" in expected]
    return {name: torch.tensor(expected[f"s{sample}_{name}"]) for name in names}


def pair(expected: Any, sample: int) -> tuple[dict[str, Any], dict[str, Any]]:
    prefix = f"s{sample}_mask_"
    masks = {k.removeprefix(prefix): torch.tensor(expected[k]) for k in expected if prefix in k}
    return model_inputs(expected, sample), masks


def logits(bridge: Any, inputs: dict[str, Any]) -> Any:
    with torch.no_grad():
        return bridge(inputs["input_ids"], **{k: v for k, v in inputs.items() if k != "input_ids"})


def assert_scores(scores: Any, ism: Any, expected: Any) -> None:
    for index, modality in enumerate(expected["modalities"]):
        if modality in scores.modalities:
            ours = scores.values[:, scores.modalities.index(modality)]
            np.testing.assert_allclose(ours, ism[:, index], atol=1e-4)
        else:
            assert not ism[:, index].any()


@pytest.mark.parametrize("sample", SAMPLES)
def test_logits(tiny: Any, expected: Any, sample: int) -> None:
    with attention.unmasked(tiny):
        ours = logits(tiny, model_inputs(expected, sample))
    np.testing.assert_allclose(ours, expected[f"s{sample}_logits"], atol=1e-4)


@pytest.mark.parametrize("sample", SAMPLES)
def test_scores_of_each_sample(tiny: Any, expected: Any, sample: int) -> None:
    with attention.unmasked(tiny):
        scores = ml.mine(tiny, [pair(expected, sample)], progress=False)
    assert_scores(scores, expected[f"s{sample}_ism"], expected)


def test_scores_and_neurons_of_the_data_set(tiny: Any, expected: Any) -> None:
    with attention.unmasked(tiny):
        scores = ml.mine(tiny, (pair(expected, s) for s in SAMPLES), progress=False)
    assert scores.samples == len(SAMPLES)
    assert_scores(scores, expected["ism_mean"], expected)
    chosen = scores.select(0.05, "LA_MU", weights=(0, 0.25, 0.25, 0.5, 0))
    assert list(chosen) == list(expected["selected_modalities"])
    for modality, neurons in chosen.items():
        assert list(neurons) == [tuple(row) for row in expected[f"msn_{modality}"].tolist()]


@pytest.mark.parametrize("value", ["zero", "min"])
@pytest.mark.parametrize("as_hooks", [False, True])
def test_ablated_logits(tiny: Any, expected: Any, value: Any, as_hooks: bool) -> None:
    with attention.unmasked(tiny):
        scores = ml.mine(tiny, (pair(expected, s) for s in SAMPLES), progress=False)
        chosen = scores.select(0.05)
        inputs = model_inputs(expected, 0)
        if as_hooks:
            hooks = ml.ablation_hooks(tiny, chosen, value)
            with tiny.hooks(fwd_hooks=hooks):
                ours = logits(tiny, inputs)
        else:
            with ml.ablate(tiny, chosen, value):
                ours = logits(tiny, inputs)
    np.testing.assert_allclose(ours, expected[f"s0_logits_ablate_{value}"], atol=1e-4)

"""The small reference checkpoints: logits, scores, neuron sets and ablated logits."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import miner_lens as ml
from tests.reference import MODEL_INPUTS, REFERENCE, load

SAMPLES = {"tiny_qwen2_vl": 4, "tiny_qwen2_audio": 3}
EACH_SAMPLE = [(name, sample) for name, count in SAMPLES.items() for sample in range(count)]


class Reference:
    """One checkpoint and what is expected of it."""

    def __init__(self, name: str) -> None:
        self.expected = load(f"{name}/expected.npz")
        self.samples = range(SAMPLES[name])
        self.bridge = ml.load(REFERENCE / name, device="cpu")

    def scores(self, *samples: int) -> ml.ImportanceScores:
        pairs = (pair(self.expected, sample) for sample in samples)
        return ml.mine(self.bridge, pairs, progress=False)

    def check(self, scores: ml.ImportanceScores, ism: Any) -> None:
        for index, modality in enumerate(self.expected["modalities"]):
            if modality in scores.modalities:
                np.testing.assert_allclose(scores[modality], ism[:, index], atol=1e-4)
            else:
                assert not ism[:, index].any()


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


@pytest.mark.parametrize(("name", "sample"), EACH_SAMPLE)
def test_logits(name: str, sample: int) -> None:
    reference = Reference(name)
    ours = logits(reference.bridge, model_inputs(reference.expected, sample))
    np.testing.assert_allclose(ours, reference.expected[f"s{sample}_logits"], atol=1e-4)


@pytest.mark.parametrize(("name", "sample"), EACH_SAMPLE)
def test_scores_of_each_sample(name: str, sample: int) -> None:
    reference = Reference(name)
    reference.check(reference.scores(sample), reference.expected[f"s{sample}_ism"])


@pytest.mark.parametrize("name", SAMPLES)
def test_scores_and_neurons_of_the_data_set(name: str) -> None:
    reference = Reference(name)
    scores = reference.scores(*reference.samples)
    assert scores.samples == len(reference.samples)
    reference.check(scores, reference.expected["ism_mean"])
    chosen = scores.select(0.05, "LA_MU", weights=(0, 0.25, 0.25, 0.5, 0))
    assert list(chosen) == list(reference.expected["selected_modalities"])
    for modality, neurons in chosen.items():
        assert list(neurons) == [tuple(row) for row in reference.expected[f"msn_{modality}"]]


@pytest.mark.parametrize("name", SAMPLES)
@pytest.mark.parametrize("value", ["zero", "min"])
@pytest.mark.parametrize("as_hooks", [False, True])
def test_ablated_logits(name: str, value: Any, as_hooks: bool) -> None:
    reference = Reference(name)
    bridge, inputs = reference.bridge, model_inputs(reference.expected, 0)
    chosen = reference.scores(*reference.samples).select(0.05)
    if as_hooks:
        with bridge.hooks(fwd_hooks=ml.ablation_hooks(bridge, chosen, value)):
            ours = logits(bridge, inputs)
    else:
        with ml.ablate(bridge, chosen, value):
            ours = logits(bridge, inputs)
    np.testing.assert_allclose(ours, reference.expected[f"s0_logits_ablate_{value}"], atol=1e-4)

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import miner_lens as ml
from miner_lens.analyzers.directions import (
    nearest_by_direction,
    output_direction,
    vocabulary_effect,
)
from miner_lens.analyzers.top_activations import TokenActivationsAnalyzer


def naive(model: Any, sample: ml.Sample, layer: int, neuron: int) -> torch.Tensor:
    """X at each token, from a cache of a pass over the sample by itself."""
    with torch.no_grad():
        _, cache = model.run_with_cache(**ml.inputs(model, sample.messages))
    return cache[f"blocks.{layer}.mlp.act.hook_out"][0, :, neuron]


def test_top_samples_and_tokens_are_those_of_passes_one_by_one(shapes: Any) -> None:
    data = ml.datasets.load("easy-vqa", limit=7, ask="both")
    alone = [naive(shapes, sample, 4, 11) for sample in data]
    best = ml.run(shapes, data, ml.TopActivationsAnalyzer(4, 11, k=3), batch_size=3)
    order = sorted(range(7), key=lambda place: -float(alone[place].max()))[:3]
    assert [place for place, _, _ in best] == order
    for place, position, value in best:
        assert value == pytest.approx(float(alone[place].max()), abs=1e-5)
        assert position == int(alone[place].argmax())
    few = ml.run(shapes, data[:2], ml.TopActivationsAnalyzer(4, 11, k=3))
    assert len(few) == 2
    seen = ml.run(shapes, data[:1], TokenActivationsAnalyzer(4, 11))
    np.testing.assert_allclose(seen.activations, alone[0], atol=1e-5)
    with torch.no_grad():
        _, cache = shapes.run_with_cache(**ml.inputs(shapes, data[0].messages))
    up = cache["blocks.4.mlp.in.hook_out"][0, :, 11]
    np.testing.assert_allclose(seen.written, up * alone[0], atol=1e-5)
    with pytest.raises(RuntimeError, match="reads one sample, not 2"):
        ml.run(shapes, data[:2], TokenActivationsAnalyzer(4, 11), batch_size=2)


def test_a_direction_through_the_vocabulary_is_what_the_weights_say(shapes: Any) -> None:
    hf = shapes.original_model
    own = hf.model.language_model.layers[2].mlp.down_proj.weight[:, 5].detach().double()
    torch.testing.assert_close(output_direction(shapes, 2, 5).double(), own)
    gain = hf.model.language_model.norm.weight.detach().double()
    head = hf.get_output_embeddings().weight.detach().double()
    logits = head @ (gain * own / own.square().mean().sqrt())
    logits = logits - logits.mean()
    promotes, suppresses = vocabulary_effect(shapes, output_direction(shapes, 2, 5), k=4)
    np.testing.assert_allclose([v for _, v in promotes], logits.topk(4).values, atol=1e-3)
    lowest = logits.topk(4, largest=False).values
    np.testing.assert_allclose([v for _, v in suppresses], lowest, atol=1e-3)
    decode = shapes.processor.tokenizer.decode
    assert [w for w, _ in promotes] == [decode([i]) for i in logits.topk(4).indices.tolist()]


def test_neighbours_are_the_largest_cosines(shapes: Any) -> None:
    layers = shapes.original_model.model.language_model.layers
    weights = [layer.mlp.down_proj.weight.detach() for layer in layers]
    own = weights[2][:, 5]
    cosines = {
        (place, n): float(torch.cosine_similarity(own, weight[:, n], dim=0))
        for place, weight in enumerate(weights)
        for n in range(weight.shape[1])
        if (place, n) != (2, 5)
    }
    found = nearest_by_direction(shapes, 2, 5, k=6)
    assert [(a, b) for a, b, _ in found] == sorted(cosines, key=lambda one: -cosines[one])[:6]
    assert found[0][2] == pytest.approx(max(cosines.values()), abs=1e-5)


@pytest.mark.parametrize("pair", [(6, 0), (0, 384), (-1, 0)])
def test_there_is_no_such_neuron(shapes: Any, pair: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="lies outside 6 layers x 384 neurons"):
        output_direction(shapes, *pair)

"""Information flow, against knockout by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import miner_lens as ml
from tests.experiments import naive_logprob


@pytest.fixture(scope="module")
def samples() -> list[ml.Sample]:
    data = list(ml.datasets.load("easy-vqa", limit=4, ask="image"))
    longer = ml.Sample(data[0].messages, "yes it is", "longer")
    return [*data, longer]


def test_windows_of_layers(shapes: Any, samples: Any, tmp_path: Path) -> None:
    flow = ml.information_flow(shapes, samples, ["image", "audio"], window=4, progress=False)
    names = [f"image in layers {n} to {n + 3}" for n in range(3)]
    assert [cut.condition for cut in flow.cuts] == names
    assert flow.trials.conditions == ("intact", *names)
    for place, sample in enumerate(samples):
        intact = naive_logprob(shapes, sample)
        assert flow.trials.logprob[0, place] == pytest.approx(intact, abs=1e-4)
    inputs = ml.inputs(shapes, samples[1].messages)
    (token,) = shapes.processor.tokenizer(samples[1].answers[0], add_special_tokens=False)[
        "input_ids"
    ]
    with ml.knockout(shapes, "image", range(1, 5)), torch.no_grad():
        row = shapes(**inputs)[0, -1].double().log_softmax(-1)
    assert flow.trials.logprob[2, 1] == pytest.approx(float(row[token]), abs=1e-4)
    assert flow.trials.correct[2, 1] == (int(row.argmax()) == token)

    table = flow.curves()
    found = table.query("measure == 'logprob' and layer == 1").squeeze()
    lost = (flow.trials.logprob[0] - flow.trials.logprob[2]).mean()
    assert found["mean"] == pytest.approx(lost)
    assert (found["last_layer"], found["samples"]) == (4, 5)
    flow.save(tmp_path / "flow.safetensors")
    loaded = ml.InformationFlow.load(tmp_path / "flow.safetensors")
    assert repr(loaded) == repr(flow)
    assert loaded.curves().equals(table)


def test_what_cannot_be(shapes: Any, samples: Any) -> None:
    for options, message in (
        ({"window": 7}, "between 1 and the model's 6 layers"),
        ({"modalities": ["smell"]}, "knows none of smell"),
    ):
        with pytest.raises(ValueError, match=message):
            ml.information_flow(shapes, samples, **options)
    with pytest.raises(ValueError, match="no data"):
        ml.information_flow(shapes, [], progress=False)
    with pytest.raises(ValueError, match="has no answers"):
        ml.information_flow(shapes, [ml.Sample(samples[0].messages)], progress=False)

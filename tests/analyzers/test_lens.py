"""The logit lens, against the model's own logits and against its definition."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import miner_lens as ml
from miner_lens.analyzers import reading
from miner_lens.analyzers.reading import Lens


@pytest.fixture(scope="module")
def samples() -> list[ml.Sample]:
    return list(ml.datasets.load("easy-vqa", limit=6, ask="both"))


@pytest.fixture(scope="module")
def speech() -> Any:
    return ml.load("speech", device="cpu")


def residuals(model: Any, inputs: dict[str, Any]) -> tuple[Tensor, list[Tensor]]:
    names = [point.name for point in ml.residual_points(model)]
    rest = {name: value for name, value in inputs.items() if name != "input"}
    logits, cache = model.run_with_cache(inputs["input"], names_filter=names, **rest)
    return logits, [cache[name] for name in names]


def run(model: Any, samples: Any, **options: Any) -> ml.LogitLens:
    options = {"progress": False, "batch_size": 4} | options
    return ml.run(model, samples, ml.LogitLensAnalyzer(), **options)


@pytest.mark.parametrize("name", ["shapes", "speech"])
def test_the_last_layer_is_the_model(name: str, request: Any, samples: Any) -> None:
    model = request.getfixturevalue(name)
    data = samples if name == "shapes" else ml.datasets.load("spoken-scenes", limit=2)
    for sample in data[:2]:
        logits, layers = residuals(model, ml.inputs(model, sample.messages))
        torch.testing.assert_close(Lens(model).logits(layers[-1]), logits, atol=1e-5, rtol=0)


def by_hand(model: Any, sample: ml.Sample) -> dict[str, Tensor]:
    """[layer measure] by modality, from the definition."""
    inputs = ml.inputs(model, sample.messages)
    logits, layers = residuals(model, inputs)
    (token, *_) = model.processor.tokenizer(sample.answers[0], add_special_tokens=False).input_ids
    masks = model.modality_layout.masks(inputs["input"])
    masks["last"] = torch.zeros_like(masks["text"])
    masks["last"][0, -1] = True
    found = {}
    for modality, mask in masks.items():
        rows = []
        for x in layers:
            here = model.unembed(model.ln_final(x))[0].double()
            p = here.softmax(-1)
            measures = [-(p * p.log()).sum(-1), p[:, token]]
            measures.append((here.argmax(-1) == logits[0].argmax(-1)).double())
            rows.append(torch.stack(measures)[:, mask[0]].mean(-1))
        if mask.any():
            found[modality] = torch.stack(rows)
    return found


@pytest.mark.parametrize("batch_size", [1, 4])
def test_it_equals_its_definition(shapes: Any, samples: Any, batch_size: int) -> None:
    lens = run(shapes, samples, batch_size=batch_size)
    expected = [by_hand(shapes, sample) for sample in samples]
    assert lens.modalities[-1] == "last"
    for place, measure in enumerate(("entropy", "answer", "agreement")):
        for modality in ("image", "text", "special", "last"):
            seen = lens.of(modality, measure)
            wanted = [one[modality][:, place] for one in expected if modality in one]
            # Samples are kept in an order of their own.
            torch.testing.assert_close(
                seen.double().sum(0), torch.stack(wanted).sum(0), atol=2e-5, rtol=1e-5
            )
            assert len(seen) == len(wanted)
    assert (lens.of("prompt", "agreement")[:, -1] == 1).all()


def test_few_logits_at_a_time(shapes: Any, samples: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run(shapes, samples, batch_size=2)
    monkeypatch.setattr(reading, "MOST_LOGITS", 3000)
    vocabulary, sizes = shapes.original_model.config.get_text_config().vocab_size, []
    head = shapes.original_model.get_output_embeddings()
    handle = head.register_forward_hook(lambda _, __, out: sizes.append(out.numel()))
    try:
        parts = run(shapes, samples, batch_size=2)
    finally:
        handle.remove()
    assert max(sizes) <= 3000
    assert len(sizes) > 6 * 3 * 5
    assert vocabulary < 3000
    torch.testing.assert_close(parts.values, whole.values, atol=1e-6, rtol=1e-6)
    for modality in whole.tops:
        assert torch.equal(parts.tops[modality], whole.tops[modality])


def test_curves_stages_and_tokens(shapes: Any, samples: Any, tmp_path: Path) -> None:
    lens = run(shapes, samples)
    table = lens.curves(resamples=100)
    row = table.query("modality == 'text' and measure == 'entropy' and layer == 3").squeeze()
    assert row["mean"] == pytest.approx(float(lens.of("text")[:, 3].mean()))
    assert row["low"] <= row["mean"] <= row["high"]
    assert set(table.query("modality == 'image'")["samples"]) == {3}
    assert "video" not in set(table["modality"])
    assert {"image", "text", "last"} <= set(lens.stages(resamples=100))
    (best, *_) = lens.top_tokens("last", 3)[-1]
    answers = [model_answer(shapes, sample) for sample in samples]
    assert best[1] == max(answers.count(a) for a in answers) / len(answers)
    assert best[0] in answers
    with pytest.raises(KeyError, match="There is no 'video' here"):
        lens.top_tokens("video")
    with pytest.raises(KeyError, match="There is no 'smell' here"):
        lens.of("smell")
    lens.save(tmp_path / "lens.safetensors")
    loaded = ml.LogitLens.load(tmp_path / "lens.safetensors")
    assert repr(loaded) == repr(lens)
    assert loaded.curves(resamples=100).equals(table)
    assert loaded.top_tokens("image") == lens.top_tokens("image")
    figure = ml.plots.curves(table, "entropy")
    assert [t.get_text() for t in figure.axes[0].get_legend().texts] == list(
        table["modality"].unique()
    )


def model_answer(model: Any, sample: ml.Sample) -> str:
    logits = model(**ml.inputs(model, sample.messages))
    return str(model.processor.tokenizer.decode(logits[0, -1].argmax().item()))


def test_beside_others_and_in_halves(shapes: Any, samples: Any) -> None:
    options: dict[str, Any] = {"progress": False, "batch_size": 4}
    whole = run(shapes, samples)
    beside, _, _ = ml.run(
        shapes,
        samples,
        ml.LogitLensAnalyzer(),
        ml.ImportanceAnalyzer(),
        ml.AttributionAnalyzer(),  # after which answers stand behind the prompts
        **options,
    )
    torch.testing.assert_close(beside.values, whole.values, atol=1e-5, rtol=1e-5)
    one, two = ml.LogitLensAnalyzer(), ml.LogitLensAnalyzer()
    ml.run(shapes, samples[:3], one, **options)
    ml.run(shapes, samples[3:], two, **options)
    assert len((one + two).result().values) == len(samples)


def test_without_answers(shapes: Any, samples: Any) -> None:
    lens = run(shapes, [ml.Sample(samples[0].messages)])
    assert not lens.of("text", "answer").any()
    assert lens.of("text", "entropy").all()
    with pytest.raises(ValueError, match="No sample has been seen"):
        ml.LogitLensAnalyzer().result()


def test_one_prompt(shapes: Any, samples: Any) -> None:
    seen = ml.logit_lens(shapes, samples[0].messages, k=2)
    inputs = ml.inputs(shapes, samples[0].messages)
    _, layers = residuals(shapes, inputs)
    for layer, x in enumerate(layers):
        logits = shapes.unembed(shapes.ln_final(x))[0]
        assert torch.equal(seen.tokens[layer], logits.topk(2).indices)
    assert seen.words[-1][-1][0] == samples[0].answers[0]
    image = shapes.original_model.config.image_token_id
    assert seen.modalities.count("image") == int((inputs["input"] == image).sum()) > 0
    table = seen.to_frame()
    assert len(table) == len(layers) * len(seen.prompt) * 2
    assert table["probability"].between(0, 1).all()
    assert samples[0].answers[0] in repr(seen)


def test_what_has_no_head() -> None:
    with pytest.raises(ValueError, match="needs a TransformerBridge with ln_final"):
        Lens(torch.nn.Linear(1, 1))

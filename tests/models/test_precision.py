"""Analyzers compute in full precision, and models as the user has set them."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import miner_lens as ml
from miner_lens.analyzers.attention_sums import AttentionSums
from miner_lens.models.precision import full_precision
from miner_lens.running.batch import Batch
from miner_lens.scoring.select import combine
from tests.families import Inputs, build, prompts
from tests.models.test_families import logits
from tests.parts import FAMILIES
from tests.towers import TEXT

PRODUCTS = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)


@pytest.fixture
def samples() -> list[ml.Sample]:
    texts = ("Is there a red circle? " * 40, "What colour is it?")
    contents = [[{"type": "text", "text": text}] for text in texts]
    return [ml.Sample([{"role": "user", "content": c}], ("red",), label="a") for c in contents]


@pytest.fixture
def settings() -> Iterator[None]:
    """Put back what a test has set."""
    yield
    torch.set_float32_matmul_precision("highest")
    torch.backends.fp32_precision = "none"
    for products in PRODUCTS:
        products.fp32_precision = "none"


def lowered() -> list[str]:
    """What is set now, of autocast and of products."""
    return [
        *(device for device in ("cpu", "cuda") if torch.is_autocast_enabled(device)),
        *(one.fp32_precision for one in PRODUCTS if one.fp32_precision not in ("none", "ieee")),
    ]


def test_counts_under_autocast(shapes: Any, samples: list[ml.Sample]) -> None:
    """Whole numbers, of the X that the model computes in bfloat16."""
    expected = []
    handles = [
        mlp.activation.register_forward_hook(lambda m, a, x: expected.append((x > 0).sum((0, 1))))
        for mlp in ml.models.access.mlps(shapes)
    ]
    inputs = ml.inputs(shapes, samples[0].messages)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        shapes.original_model(input_ids=inputs.pop("input"), **inputs)
    for handle in handles:
        handle.remove()
    with torch.autocast("cpu", torch.bfloat16):
        counts = ml.run(shapes, samples[:1], ml.DomainAnalyzer(), progress=False)
    assert torch.equal(counts.over_zero[..., 0], torch.stack(expected))


def test_more_tokens_than_float32_can_count() -> None:
    many = 2**24 + 3
    masks = {"text": torch.ones(1, many, dtype=torch.bool)}
    batch = Batch({"input_ids": torch.ones(1, many)}, masks, ("a",), (ml.Sample([], label="a"),))
    analyzer = ml.DomainAnalyzer()
    analyzer.see(torch.ones(1, many, 1), ml.Point("x", 0), batch)
    (counted,) = (one.value for name, one in analyzer.added().items() if "over_zero" in name)
    assert counted.tolist() == [[many]]


class Products(ml.Analyzer[Any]):
    """The products of X with itself, and what was set while an author's code ran."""

    def needs(self) -> list[Any]:
        return [Watching(self._watched)]

    def points(self, model: Any) -> list[ml.Point]:
        self._x: list[Tensor] = []
        return ml.activation_points(model)[:1]

    def __init__(self) -> None:
        super().__init__()
        self._watched: list[Any] = []

    def see(self, x: Tensor, point: ml.Point, batch: Batch) -> None:
        self._watched.append(("see", lowered()))
        rows = x[batch.real].float()
        self.sum("products", rows.T @ rows)
        self._x.append(rows)

    def finish(self, batch: Batch) -> None:
        self._watched.append(("finish", lowered()))

    def result(self) -> Any:
        self._watched.append(("result", lowered()))
        return self["products"], self._x, self._watched


class Watching(AttentionSums):
    def __init__(self, watched: list[Any]) -> None:
        super().__init__()
        object.__setattr__(self, "watched", watched)

    def weights(self, *args: Any, **options: Any) -> Tensor:
        self.watched.append(("needs", lowered()))  # type: ignore[attr-defined]
        return super().weights(*args, **options)


@pytest.mark.parametrize("how", ["autocast", "high", "medium", "all"])
def test_what_an_author_writes_is_shielded(
    shapes: Any, samples: list[ml.Sample], settings: None, how: str
) -> None:
    seen = []

    def look(module: Any, args: Any) -> None:
        seen.append(lowered())

    if how == "all":
        torch.backends.fp32_precision = "tf32"
    elif how != "autocast":
        torch.set_float32_matmul_precision(how)
    handle = shapes.original_model.get_decoder().layers[1].register_forward_pre_hook(look)
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        before = lowered()
        products, rows, watched = ml.run(shapes, samples, Products(), progress=False)
        assert lowered() == before
    handle.remove()
    assert before
    assert seen == [before] * 2  # the model computes as it is told
    assert {name for name, _ in watched} == {"see", "finish", "result", "needs"}
    assert all(not settings for _, settings in watched)
    expected = sum(one.double().T @ one.double() for one in rows)
    torch.testing.assert_close(products, expected, atol=1e-3, rtol=1e-5)


def test_a_setting_of_the_whole_still_goes_on_to_its_parts(settings: None) -> None:
    torch.backends.fp32_precision = "tf32"
    with full_precision():
        assert not lowered()
    assert torch.backends.cuda.matmul.fp32_precision == "tf32"
    torch.backends.fp32_precision = "ieee"
    assert torch.backends.cuda.matmul.fp32_precision == "ieee"
    torch.set_float32_matmul_precision("high")
    with full_precision():
        assert not lowered()
    assert torch.get_float32_matmul_precision() == "high"


def test_the_last_one_out_puts_it_back(settings: None) -> None:
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    inside, leave = threading.Event(), threading.Event()

    def other() -> None:
        with full_precision():
            inside.set()
            leave.wait(5)

    thread = threading.Thread(target=other)
    with full_precision():
        thread.start()
        inside.wait(5)
    assert torch.backends.cuda.matmul.fp32_precision == "ieee"  # the other one is at work
    leave.set()
    thread.join()
    assert torch.backends.cuda.matmul.fp32_precision == "tf32"


ANALYZERS = {
    "importance": ml.ImportanceAnalyzer,
    "attribution": ml.AttributionAnalyzer,
    "contribution": ml.ContributionAnalyzer,
    "lens": ml.LogitLensAnalyzer,
    "tuned": ml.TunedLensAnalyzer,
    "convergence": ml.ConvergenceAnalyzer,
    "reach": ml.SemanticReachAnalyzer,
}


@pytest.mark.parametrize("name", ANALYZERS)
def test_no_product_of_an_analyzer_is_rounded(
    name: str, shapes: Any, samples: list[ml.Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In autocast of the model, what analyzers add up is never of a lower dtype than X is."""
    kept: list[torch.dtype] = []
    analyzer = ANALYZERS[name]()
    for method in ("sum", "keep"):
        add = getattr(analyzer, method)

        def noted(name: str, value: Any, *args: Any, add: Any = add, **options: Any) -> None:
            value = torch.as_tensor(value)
            kept.append(value.dtype)
            add(name, value, *args, **options)

        monkeypatch.setattr(analyzer, method, noted)
    with torch.autocast("cpu", torch.bfloat16):
        ml.run(shapes, samples, analyzer, progress=False)
    assert kept
    assert not {torch.bfloat16, torch.float16} & set(kept)


PADDED = prompts([(5, 12)], [(6, 4), (7, 4)], [(8, 5)])


def gemma2() -> tuple[Any, Inputs]:
    """Its own attention is eager."""
    more = {"head_dim": 8, "attn_logit_softcapping": 5.0, "sliding_window": 64}
    return build("Gemma2ForCausalLM", **TEXT | more), PADDED


def gemma3() -> tuple[Any, Inputs]:
    return build("Gemma3ForCausalLM", **TEXT | {"head_dim": 8, "sliding_window": 64}), PADDED


def qwen3() -> tuple[Any, Inputs]:
    return build("Qwen3ForCausalLM", **TEXT | {"head_dim": 8}), PADDED


@pytest.mark.filterwarnings("ignore:TransformerLens rebuilds")
@pytest.mark.parametrize("make", [gemma2, gemma3, qwen3, FAMILIES["llava"].make])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_padding_is_left_out_under_autocast(make: Any, dtype: torch.dtype) -> None:
    """Masks are made in the embeddings' float32, and scores are of autocast's dtype."""
    model, inputs = make()
    real = inputs["attention_mask"] == 1
    with torch.autocast("cpu", dtype):
        expected = logits(model, inputs)
        bridge = ml.wrap(model)
        found = logits(bridge, inputs)
        text = {"text": real}
        scores = ml.mine(bridge, [(inputs, text)], metrics=("prob", "mean"), progress=False)
    assert found.isfinite().all()
    spread = float(expected[real].float().std())
    digits = torch.finfo(dtype).eps
    torch.testing.assert_close(found[real], expected[real], atol=16 * digits * spread, rtol=0)
    assert scores.values.isfinite().all()


def test_selection_under_autocast() -> None:
    values = torch.rand(2, 3, 4, 50)
    expected = combine(values, {"mean": 0.3, "max": 0.7}, ["mean", "max"])
    with torch.autocast("cpu", torch.bfloat16):
        combined = combine(values, {"mean": 0.3, "max": 0.7}, ["mean", "max"])
    assert torch.equal(combined, expected)

"""Counts by domain, against counting by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import miner_lens as ml


@pytest.fixture(scope="module")
def data() -> dict[str, list[ml.Sample]]:
    return {
        "pictures": list(ml.datasets.load("easy-vqa", limit=5, ask="image")),
        "digits": list(ml.datasets.load("digits", limit=4)),
        "sentences": list(ml.datasets.load("easy-vqa", limit=4, ask="text")),
    }


def by_hand(model: Any, data: dict[str, list[ml.Sample]], site: str) -> ml.DomainCounts:
    points = ml.activation_points(model, site)
    counts, tokens = [], []
    for samples in data.values():
        total: Any = 0
        seen = 0
        for sample in samples:
            inputs = ml.inputs(model, sample.messages)
            if site != "llm" and "pixel_values" not in inputs:
                continue
            names = [point.name for point in points]
            _, cache = model.run_with_cache(inputs.pop("input"), names_filter=names, **inputs)
            rows = [cache[name].flatten(0, -2) for name in names]
            total = total + torch.stack([(x > 0).sum(0) for x in rows])
            seen += len(rows[0])
        counts.append(total if seen else torch.zeros_like(counts[0]))
        tokens.append(seen)
    return ml.DomainCounts(torch.stack(counts, -1), torch.tensor(tokens), list(data))


@pytest.mark.parametrize("batch_size", [1, 4])
def test_counting_by_hand(shapes: Any, data: Any, batch_size: int) -> None:
    found = ml.run(
        shapes,
        data,
        ml.DomainAnalyzer(),
        ml.DomainAnalyzer("vision"),
        batch_size=batch_size,
        progress=False,
    )
    for site, counts in zip(("llm", "vision"), found, strict=True):
        expected = by_hand(shapes, data, site)
        assert counts.domains == ("digits", "pictures", "sentences")
        assert counts.site == site
        for name in data:
            one, two = counts.domains.index(name), expected.domains.index(name)
            assert counts.tokens[one] == expected.tokens[two]
            different = (counts.over_zero[..., one] - expected.over_zero[..., two]).abs()
            # Padding changes sums in the last bits, and so the sign of what is next to 0.
            assert different.max() <= (0 if batch_size == 1 else 1)
    with pytest.raises(ValueError, match="'sentences' has no tokens in site 'vision'"):
        found[1].select()
    assert found[0].select(0.05)["sentences"].identity == shapes_identity(shapes)


def shapes_identity(model: Any) -> Any:
    return ml.NeuronSet.of([(0, 0)], model).identity


def test_halves_add_up(shapes: Any, data: Any) -> None:
    samples = [
        ml.Sample(s.messages, s.answers, label=name) for name, some in data.items() for s in some
    ]
    options: dict[str, Any] = {"progress": False}
    whole = ml.run(shapes, samples, ml.DomainAnalyzer(), **options)
    one, two = ml.DomainAnalyzer(), ml.DomainAnalyzer()
    ml.run(shapes, samples[:6], one, **options)
    ml.run(shapes, samples[6:], two, **options)
    assert torch.equal((one + two).result().over_zero, whole.over_zero)
    added = one.result() + two.result()
    assert added.tokens.sum() == whole.tokens.sum()


def test_samples_without_a_label(shapes: Any, data: Any) -> None:
    with pytest.raises(RuntimeError, match="counts by label, and a sample has none"):
        ml.run(shapes, data["pictures"], ml.DomainAnalyzer(), progress=False)
    with pytest.raises(ValueError, match="No sample has been seen"):
        ml.DomainAnalyzer().result()

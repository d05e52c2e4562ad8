"""The matrix of domains, against trials by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import miner_lens as ml


@pytest.fixture(scope="module")
def data() -> dict[str, list[ml.Sample]]:
    return {ask: list(ml.datasets.load("easy-vqa", limit=4, ask=ask)) for ask in ("image", "text")}


def selection(model: Any, site: str, **sets: list[int]) -> dict[str, ml.NeuronSet]:
    return {
        name: ml.NeuronSet.of([(1, neuron) for neuron in neurons], model, site)
        for name, neurons in sets.items()
    }


def test_the_matrix(shapes: Any, data: Any, tmp_path: Path) -> None:
    llm = selection(shapes, "llm", image=[*range(100)], text=[*range(90, 250)])
    vision = selection(shapes, "vision", image=[*range(150)], text=[])
    found = ml.domain_matrix(shapes, data, llm, vision, seeds=2, progress=False)
    names = ["image in llm", "image in vision", "image in llm+vision", "text in llm"]
    names.append("text in llm+vision")
    assert [row.condition for row in found.rows] == names
    assert [row.neurons for row in found.rows] == [100, 150, 250, 160, 160]
    assert len(found.trials.conditions) == 1 + 5 * 3

    samples = [*data["image"], *data["text"]]
    with ml.ablate(shapes, llm["image"]), ml.ablate(shapes, vision["image"]):
        by_hand = ml.trials(shapes, samples, [ml.Condition("off")], progress=False)
    place = found.trials.conditions.index("image in llm+vision")
    assert (found.trials.logprob[place] == by_hand.logprob[0]).all()
    intact = found.trials.logprob[0]
    cost = (intact - by_hand.logprob[0])[:4].mean()
    assert found.matrix().loc["image in llm+vision", "image"] == pytest.approx(cost)

    table = found.to_frame()
    assert len(table) == 5 * 2 * 2
    assert {"off", "sites", "neurons", "on", "p_holm", "beyond_chance"} <= set(table.columns)
    row = table[(table["sites"] == "llm+vision") & (table["measure"] == "logprob")]
    row = row[(row["off"] == "image") & (row["on"] == "image")]
    assert row["cost"].item() == pytest.approx(cost)

    found.save(tmp_path / "matrix.safetensors")
    loaded = ml.DomainMatrix.load(tmp_path / "matrix.safetensors")
    assert repr(loaded) == repr(found)
    assert loaded.to_frame().equals(table)
    assert loaded.rows == found.rows


def test_turned_up(shapes: Any, data: Any) -> None:
    llm = selection(shapes, "llm", image=[*range(100)])
    found = ml.domain_matrix(shapes, data, llm, by=2.0, seeds=1, progress=False)
    with ml.scale(shapes, llm["image"], by=2.0):
        by_hand = ml.trials(shapes, data["text"], [ml.Condition("up")], progress=False)
    place = found.trials.conditions.index("image in llm")
    # Samples are batched with others here, which changes the last bits.
    assert found.trials.logprob[place][4:] == pytest.approx(by_hand.logprob[0], abs=1e-5)
    assert "times 2" in repr(found)


def test_what_cannot_be(shapes: Any, data: Any) -> None:
    llm = selection(shapes, "llm", image=[1], text=[])
    with pytest.raises(ValueError, match="Give at least one selection"):
        ml.domain_matrix(shapes, data)
    with pytest.raises(ValueError, match="one selection for each site"):
        ml.domain_matrix(shapes, data, llm, llm)
    with pytest.raises(ValueError, match="at least one seed"):
        ml.domain_matrix(shapes, data, llm, seeds=0)
    for sites in ([["vision"]], [[]], [["llm", "llm"]]):
        with pytest.raises(ValueError, match="name sites that are selected"):
            ml.domain_matrix(shapes, data, llm, sites=sites)
    with pytest.raises(ValueError, match="No domain has any neurons"):
        ml.domain_matrix(shapes, data, selection(shapes, "llm", image=[]))
    with pytest.raises(ValueError, match="has no label"):
        ml.domain_matrix(shapes, data["text"], llm, seeds=1, progress=False)

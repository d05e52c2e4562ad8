from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import miner_lens as ml
from tests.experiments import naive_logprob

PAIR = (3, 17)


def test_a_card_holds_what_its_parts_say(shapes: Any, tmp_path: Path) -> None:
    data = ml.datasets.load("easy-vqa", limit=6)
    data = [replace(one, label="ab"[n % 2]) for n, one in enumerate(data)]
    card = ml.card(shapes, data, *PAIR, k=2, batch_size=4, progress=False)
    table = card.frame.set_index(["name", "metric"])
    mined = ml.mine(shapes, data, progress=False)
    effect = ml.attribute(shapes, data, progress=False)
    for scores, metric, row in ((mined, "max", 2), (effect, "attribution", 0)):
        values = scores["image"][row]
        assert table.loc[("image", metric), "value"] == pytest.approx(float(values[PAIR]), abs=1e-5)
        rank = 1 + int((values > values[PAIR]).sum())
        assert abs(table.loc[("image", metric), "rank"] - rank) <= 2  # ties within rounding
    counts = ml.run(shapes, data, ml.DomainAnalyzer(), progress=False)
    rate = int(counts.over_zero[(*PAIR, 1)]) / int(counts.tokens[1])
    assert table.loc[("b", "active"), "value"] == pytest.approx(rate, abs=0.01)
    off = ml.NeuronSet.of([PAIR], shapes)
    for label in "ab":
        own = [one for one in data if one.label == label]
        intact = [naive_logprob(shapes, one) for one in own]
        with ml.ablate(shapes, off):
            lost = np.mean(intact) - np.mean([naive_logprob(shapes, one) for one in own])
        (row,) = (r for r in card.costs if (r["label"], r["measure"]) == (label, "logprob"))
        assert row["cost"] == pytest.approx(lost, abs=1e-5)
        assert row["low"] <= row["cost"] <= row["high"]
    assert len(card.moments) == len(card.promotes) == len(card.neighbours) == 2
    first = card.moments[0]
    assert first.value == max(first.activations) >= card.moments[1].value
    (image,) = first.media
    assert image.grid == (1, 4, 4)
    assert [first.modalities[n] for n in image.positions] == ["image"] * 16
    assert "on 6 samples" in card.summary
    card.save(tmp_path / "card.safetensors")
    loaded = ml.NeuronCard.load(tmp_path / "card.safetensors")
    assert loaded.moments == card.moments
    assert loaded._repr_html_() == card._repr_html_()


class Balanced(HTMLParser):
    """Every tag that is opened is closed, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_a_card_of_sound_without_answers_is_one_page(tmp_path: Path) -> None:
    model = ml.load("speech", device="cpu")
    data = [
        replace(one, answers=(), id=f"<{n}>")
        for n, one in enumerate(ml.datasets.load("spoken-scenes", limit=2))
    ]
    mined = ml.mine(model, data, metrics=("max",), progress=False)
    card = ml.card(model, data, 1, 2, scores=[mined], k=1, progress=False)
    assert set(card.frame["metric"]) == {"max", "mean X"}
    assert card.costs == []
    (sound,) = card.moments[0].media
    assert sound.kind == "audio"
    assert sound.seconds is not None
    assert sound.seconds > 0.5
    assert max(sound.outline) > 0
    page = card._repr_html_()
    parser = Balanced()
    parser.feed(page)
    assert not parser.open
    assert not re.search(r"https?:|<script|<link|url\(", page)
    assert "&lt;" in page
    assert "<0>" not in page
    assert "<polygon" in page
    figure = card.figure()
    assert len(figure.axes) == 2


def test_bad_cards(shapes: Any) -> None:
    data = ml.datasets.load("easy-vqa", limit=1)
    with pytest.raises(ValueError, match="no data"):
        ml.card(shapes, [], *PAIR)
    with pytest.raises(ValueError, match="k must be at least 1"):
        ml.card(shapes, data, *PAIR, k=0)
    with pytest.raises(ValueError, match="lies outside"):
        ml.card(shapes, data, 3, 999)
    with pytest.raises(ValueError, match="this model has 6 x 384"):
        ml.card(shapes, data, *PAIR, scores=[foreign()])


def foreign() -> ml.ImportanceScores:
    import torch

    known = ml.ModelIdentity("other", "Other", 2, 4)
    return ml.ImportanceScores(torch.rand(5, 1, 2, 4), ["text"], identity=known)

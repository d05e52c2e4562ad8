"""The report, as a browser shows it and as text."""

from __future__ import annotations

import json
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import miner_lens as ml
from miner_lens.experiments.limits import limits
from miner_lens.reporting.sections import section
from tests.reporting.browser import ENTER, TAB, THERE, browser

# Where to leave screenshots for somebody to look at.
PICTURES = os.environ.get("MINER_LENS_SCREENSHOTS")


def trials(right: Any, labels: tuple[str | None, ...] | None = None) -> ml.Trials:
    """Conditions intact, off and random; each with the answers that are right."""
    correct = np.array(right, dtype=bool)
    names = tuple(f"q{n}" for n in range(correct.shape[1]))
    conditions = ("intact", "off", "random")[: len(correct)]
    logprob = np.where(correct, -0.1, -2.0) - 0.01 * np.arange(correct.shape[1])
    return ml.Trials(names, labels or (None,) * len(names), conditions, correct, logprob)


@pytest.fixture(scope="module")
def results(shapes: Any) -> dict[str, Any]:
    data = ml.datasets.load("easy-vqa", limit=4, ask="both")
    data = [replace(one, label="picture" if "image" in one.id else "sentence") for one in data]
    scores = ml.mine(shapes, data, batch_size=4, progress=False)
    msns = scores.select(ratio=0.05)
    layer, neuron = next(iter(msns["image"]))
    table = trials([[True] * 14, [True] * 6 + [False] * 8, [True] * 13 + [False]])
    return {
        "scores": scores,
        "neurons": msns,
        "overlap <of> modalities": ml.experiments.overlap(msns),
        "trials": table,
        "card": ml.card(shapes, data, layer, neuron, [scores], k=2, progress=False),
    }


@pytest.fixture(scope="module")
def page(results: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ml.report(results, tmp_path_factory.mktemp("report") / "new" / "report.html", "R & D")


def test_one_page_says_what_came_out(page: Path, results: dict[str, Any]) -> None:
    text = page.read_text()
    assert "<title>R &amp; D</title>" in text
    assert "overlap &lt;of&gt; modalities" in text
    assert "<of>" not in text
    outside = re.findall(r"""(?:src|href)=["'](?!#|data:)[^"']*|url\((?!#)[^)]*""", text)
    assert not outside
    for said in ("off costs most: 0.571", results["card"].summary.split("'")[0], "transformers "):
        assert said in text
    assert results["scores"].identity.fingerprint in text
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert len(ids) == len(set(ids))
    for one in re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', text):
        assert (one[0] or one[1]) in ids


@pytest.mark.skipif(not THERE, reason="needs chromium and chromedriver")
def test_the_page_in_a_browser(page: Path) -> None:
    with browser() as window:
        for width in (400, 1400):
            for scheme in ("light", "dark"):
                window.show(width, scheme)
                window.open(page.as_uri())
                assert window.script("return document.documentElement.scrollWidth") <= width
                fore, back = window.script(
                    "const s = getComputedStyle(document.body); return [s.color, s.backgroundColor]"
                )
                assert contrast(fore, back) > 7
                assert (brightness(back) > 0.5) == (scheme == "light")
                if PICTURES:
                    Path(PICTURES, f"report-{width}-{scheme}.png").write_bytes(window.picture())
        sizes = window.script(
            "return [...document.querySelectorAll('.figure svg')].map((one) => "
            "[one.getBoundingClientRect().height, one.querySelectorAll('path').length])"
        )
        assert len(sizes) == 5
        assert all(height > 100 and paths > 10 for height, paths in sizes)
        assert not window.logs("browser")
        keyboard(window)
        requests = [
            event["message"]["params"]["request"]["url"]
            for event in map(json.loads, (one["message"] for one in window.logs("performance")))
            if event["message"]["method"] == "Network.requestWillBeSent"
        ]
        assert requests
        assert {url for url in requests if not url.startswith("data:")} == {page.as_uri()}


def keyboard(window: Any) -> None:
    """Sort a table and fold a card with keys alone."""
    cells = (
        "return [...document.querySelectorAll('#t3-1 tbody tr')].map((one) => "
        "Number(one.cells[{column}].dataset.value))"
    )
    heads = window.script(
        "return [...document.querySelectorAll('#t3-1 th')].map((one) => one.textContent)"
    )
    column = heads.index("cost")
    window.press(TAB)
    assert window.script("return document.activeElement.className") == "skip"
    for _ in range(200):
        window.press(TAB)
        if window.script(
            "const e = document.activeElement; return e.tagName === 'BUTTON' && "
            "e.closest('table').id === 't3-1' && e.textContent === 'cost'"
        ):
            break
    else:
        pytest.fail("Tab does not reach the table's heads.")
    read = cells.format(column=column)
    window.press(ENTER)
    rising = window.script(read)
    assert rising == sorted(rising)
    assert len(set(rising)) > 2
    window.press(ENTER)
    assert window.script(read) == rising[::-1]
    sort = "return document.activeElement.parentElement.getAttribute('aria-sort')"
    assert window.script(sort) == "descending"
    window.script("document.querySelector('summary').focus()")
    window.press(ENTER)
    assert window.script("return document.querySelector('details').open") is False
    rows = (
        "const i = document.querySelector('label.filter input'); i.value = 'image'; "
        "i.dispatchEvent(new Event('input')); return [...document.getElementById("
        "i.dataset.table).tBodies[0].rows].filter((one) => !one.hidden).length"
    )
    assert window.script(rows) > 0


def brightness(colour: str) -> float:
    """Relative luminance (WCAG 2.2) of rgb(...)."""
    parts = [int(one) / 255 for one in re.findall(r"\d+", colour)[:3]]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return float(np.dot(linear, [0.2126, 0.7152, 0.0722]))


def contrast(one: str, other: str) -> float:
    low, high = sorted((brightness(one), brightness(other)))
    return (high + 0.05) / (low + 0.05)


def test_limits_of_trials() -> None:
    right = [[True] * 8, [True] * 4 + [False] * 4]
    few, accuracy, logprob = limits(trials(right))
    assert few.startswith("8 samples are few")
    lost = np.array([0] * 4 + [1] * 4)
    assert f"below about {2.802 * lost.std(ddof=1) / 8**0.5:.2g} of the accuracy" in accuracy
    assert "nats" in logprob
    (same,) = limits(trials([[True] * 10, [True] * 10]))
    assert "up to 26 % might" in same  # 0.74 ** 10 = 0.05
    assert limits(trials([[True], [False]])) == ["One sample says nothing of any other."]
    assert limits(trials([[True, False]])) == []
    by_label = limits(trials(right, ("a",) * 7 + ("b",)))
    assert by_label[-1] == "One sample under label b says nothing of any other."


def test_limits_of_scores_and_findings(results: dict[str, Any]) -> None:
    scores = ml.ImportanceScores(
        torch.rand(5, 2, 2, 6), ["text", "video"], samples=3, occurrences=(3, 0), skipped=2
    )
    absent, skipped, means = limits(scores)
    assert "No sample has video" in absent
    assert skipped.startswith("2 samples could not be used")
    assert "over 3 samples" in means
    assert "outside of these data" in limits(results["card"])[-1]
    assert limits(object()) == []


def test_tables_figures_and_long_tables(tmp_path: Path) -> None:
    table = pd.DataFrame({"n": range(600), "x": np.linspace(0, 1, 600)})
    figure = ml.plots.curves(
        pd.DataFrame({"layer": [0, 1], "mean": 1.0, "low": 0.5, "high": 2.0, "modality": "text"}),
        "entropy",
    )
    text = ml.report([table, figure], tmp_path / "r.html").read_text()
    assert "the first 500 of 600 rows" in text
    assert text.count("<svg") == 1
    assert ml.report([table, figure], tmp_path / "r.html").read_text() == text


def test_bad_reports(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no results"):
        ml.report({}, tmp_path / "r.html")
    with pytest.raises(TypeError, match="x is a int, which a report cannot show"):
        ml.report({"x": 3}, tmp_path / "r.html")
    with pytest.raises(IsADirectoryError, match="is a folder"):
        ml.report([pd.DataFrame()], tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_curves_of_samples_are_drawn() -> None:
    values = torch.rand(3, 4, 2, 2)
    counts = torch.ones(3, 2, dtype=torch.long)
    flow = section("flow", ml.AttentionFlow(values, counts, ("text", "image")))
    assert list(flow.figures) == ["effect", "saliency"]
    assert len(flow.tables["curves"]) == 4 * 2 * 2
    reach = ml.SemanticReach(
        {"probing/image": torch.rand(3, 4, 6)}, {"probing/image": torch.arange(3)}
    )
    assert list(section("reach", reach).figures) == ["probing"]

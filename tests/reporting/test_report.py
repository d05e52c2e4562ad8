"""The report, as a browser shows it and as text."""

from __future__ import annotations

import json
import os
import re
import time
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import miner_lens as ml
from miner_lens.experiments.figures import COLOURS
from miner_lens.experiments.limits import limits
from miner_lens.reporting import circuitsvis
from miner_lens.reporting.drawing import svg
from miner_lens.reporting.sections import section
from tests.reporting.browser import ENTER, RIGHT, TAB, THERE, browser

DRAWN = bool(circuitsvis.bundle())
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
        "card": with_a_tag(ml.card(shapes, data, layer, neuron, [scores], k=2, progress=False)),
    }


def with_a_tag(card: ml.NeuronCard) -> ml.NeuronCard:
    """The card, with a token that would make what follows bold if it were taken for HTML."""
    first, *others = card.info["moments"]
    changed = {**first, "tokens": ["<b>&lt;", *first["tokens"][1:]]}
    return ml.NeuronCard(card.frame, {**card.info, "moments": [changed, *others]})


@pytest.fixture(scope="module")
def page(results: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ml.report(results, tmp_path_factory.mktemp("report") / "new" / "report.html", "R & D")


def test_one_page_says_what_came_out(page: Path, results: dict[str, Any]) -> None:
    text = page.read_text().replace(circuitsvis.bundle(), "")
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
def test_the_page_in_a_browser(page: Path, results: dict[str, Any]) -> None:
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
                tokens(window, results["card"])
                if PICTURES:
                    Path(PICTURES, f"report-{width}-{scheme}.png").write_bytes(window.picture())
        sizes = window.script(
            "return [...document.querySelectorAll('.figure svg')].map((one) => "
            "[one.getBoundingClientRect().height, one.querySelectorAll('path').length])"
        )
        assert len(sizes) == 5
        assert all(height > 100 and paths > 10 for height, paths in sizes)
        keyboard(window)
        figures(window)
        assert not window.logs("browser")
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


def tokens(window: Any, card: Any) -> None:
    """Every prompt is there as it is, coloured by modality."""
    read = (
        "return [...document.querySelectorAll('.prompt[data-most]')].map((one) => [one.textContent,"
        " [...one.querySelectorAll('[data-kind]')].map((run) => [run.dataset.kind, "
        "run.className, getComputedStyle(run.querySelector('div > span > span') || run)"
        ".backgroundColor])])"
    )
    until = time.monotonic() + 20
    while DRAWN and window.script("return document.querySelectorAll('.run:empty').length"):
        assert time.monotonic() < until
    found = window.script(read)
    assert len(found) == len(card.moments)
    for (text, runs), moment in zip(found, card.moments, strict=True):
        hidden = {position for medium in moment.media for position in medium.positions[1:]}
        shown = [n for n in range(len(moment.tokens)) if n not in hidden]
        said = re.sub(r"[\s\u2060\u21b5]", "", text).replace("[image:16tokens]", "")
        placeholders = {position for medium in moment.media for position in medium.positions}
        words = "".join(moment.tokens[n] for n in shown if n not in placeholders)
        assert said == re.sub(r"\s", "", words)
        kinds = [moment.modalities[n] for n in shown]
        # circuitsvis draws runs of one modality.
        assert [kind for kind, _ in groupby(kind for kind, *_ in runs)] == [
            kind for kind, _ in groupby(kinds)
        ]
        (peak,) = (run for run in runs if "peak" in run[1])
        assert peak[0] == moment.modalities[moment.peak]
        if DRAWN and moment is card.moments[0]:
            colour = COLOURS[peak[0]]
            wanted = [int(colour[place : place + 2], 16) for place in (1, 3, 5)]
            assert [int(one) for one in re.findall(r"\d+", peak[2])[:3]] == wanted


def figures(window: Any) -> None:
    """Read a figure's values and hide a series with keys alone."""
    at = "const f = document.querySelectorAll('.figure')[0]; "
    first = window.script(at + "f.focus(); return f.querySelector('.values title').textContent")
    told = at + "return f.querySelector('output').textContent"
    assert not window.script(told)
    window.press(RIGHT)
    assert window.script(told) == first
    assert re.fullmatch(r"text; layer of the llm 0; neurons \d+", first)
    window.press(RIGHT)
    assert "layer of the llm 1" in window.script(told)
    shown = (
        at + 'return [...f.querySelectorAll(\'[id*="-series-0-"], [data-series="0"]\')]'
        ".map((one) => one.style.display)"
    )
    assert set(window.script(shown)) == {""}
    window.press(TAB)
    assert window.script("return document.activeElement.getAttribute('aria-label')") == "text"
    window.press(ENTER)
    assert set(window.script(shown)) == {"none"}
    window.press(ENTER)
    assert set(window.script(shown)) == {""}


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


def test_limits_of_costs() -> None:
    rows = [
        ("a", "correct", 4, 0.0, 0.0, 0.0),
        ("a", "logprob", 4, 1.0, 0.0, 2.0),
        ("a", "logprob", 4, 1.0, 0.9, 1.1),
        ("a", "logprob", 4, 1.0, 0.5, 1.0),
        ("b", "correct", 20, 0.5, 0.25, 0.75),
    ]
    table = pd.DataFrame(rows, columns=["label", "measure", "samples", "cost", "low", "high"])
    zero, few, same, nats, right = limits(ml.experiments.RatioSweep(table))
    assert zero.startswith("The 95 % intervals of 2 of 5 rows")
    assert few.startswith("4 samples of a are few")
    assert "of a: of 4 samples, up to 53 % might" in same  # 0.47 ** 4 = 0.05
    errors = [0.5 / 3.92, 2.0 / 3.92]  # an interval is 2 x 1.96 of them wide
    middle, most = (f"below {'about ' * (n == 0)}{2.802 * e:.2g}" for n, e in enumerate(errors))
    assert middle in nats
    assert most in nats
    assert "20 samples of b, costs below about 0.36 of the accuracy" in right


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


def test_without_circuitsvis_tokens_are_there_too(
    page: Path, results: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(circuitsvis, "bundle", lambda: "")
    text = ml.report({"card": results["card"]}, tmp_path / "r.html").read_text()
    assert "CircuitsVis=" not in text
    assert "&lt;b&gt;&amp;lt;</span>" in text
    kinds = set(results["card"].moments[0].modalities)
    assert kinds == {"text", "special", "image"}
    assert all(f'data-kind="{kind}"' in text for kind in kinds)
    assert ("CircuitsVis=" in page.read_text()) == DRAWN


def test_the_bundle_is_not_needed_where_there_are_no_tokens(tmp_path: Path) -> None:
    text = ml.report([pd.DataFrame({"n": [1]})], tmp_path / "r.html").read_text()
    assert "CircuitsVis=" not in text
    assert "</script" not in circuitsvis.bundle()
    assert "sourceMappingURL" not in circuitsvis.bundle()


def test_lines_of_a_figure_have_colours_of_their_own() -> None:
    """Also where one name has another's, or none."""
    names = ["image", "text", "special_text", "last", "video", "all", "random", "kind a", "kind b"]
    table = pd.DataFrame(
        {"layer": 0, "mean": 1.0, "low": 0.5, "high": 2.0, "modality": names, "x": 0.0, "y": 0.0}
    )
    lines = ml.plots.curves(table, "entropy").axes[0].get_lines()
    colours = {line.get_label(): line.get_color() for line in lines}
    assert list(colours) == sorted(names, key=names.index)
    assert len(set(colours.values())) == len(names)
    assert colours["text"] == COLOURS["text"]
    assert colours["video"] == COLOURS["video"]
    clouds = ml.plots.scatter(table).axes[0].collections
    assert len({tuple(cloud.get_facecolor()[0]) for cloud in clouds}) == len(names)


def test_a_figure_is_left_as_it_was() -> None:
    table = pd.DataFrame(
        {"layer": [0, 1], "mean": [1.0, 3.0], "low": 0.5, "high": 2.0, "modality": "<text>"}
    )
    figure = ml.plots.curves(table, "entropy")
    drawn = svg("f", "entropy by layer", figure)
    assert [one.get_gid() for one in figure.axes[0].get_lines()] == [None]
    assert 'data-series="[&quot;&lt;text&gt;&quot;]"' in drawn
    ids = re.findall(r'id="f-(series|legend)-0-', drawn)
    assert sorted(ids) == ["legend", "legend", "series", "series"]  # the line and its band
    titles = re.findall(r"<title>([^<]*)</title>", drawn)
    assert titles == ["&lt;text&gt;; layer 0; entropy 1", "&lt;text&gt;; layer 1; entropy 3"]
    (low, high) = (float(one) for one in re.findall(r'cy="([\d.]+)"', drawn))
    line = re.search(
        r'id="f-series-0-0".*?d="M ([\d.]+) ([\d.]+) \nL ([\d.]+) ([\d.]+)', drawn, re.S
    )
    assert line is not None
    assert (low, high) == pytest.approx((float(line[2]), float(line[4])), abs=0.2)


def test_text_is_said_among_the_plain_words_alone(tmp_path: Path) -> None:
    table = pd.DataFrame({"n": [1, 2]})
    text = ml.report({"note": "One & one.\nTwo.", "t": table}, tmp_path / "r.html").read_text()
    assert "<li>note:<ul" in text
    assert "<li>One &amp; one.</li><li>Two.</li>" in text
    assert '"#result-0"' not in text  # no section
    assert ">2 rows</caption>" in text


def test_sentences_of_what_was_mined_selected_and_tried(results: dict[str, Any]) -> None:
    (scores,) = section("s", results["scores"]).sentences
    metrics = ", ".join(results["scores"].metrics)
    assert scores.startswith(f"{metrics} of 6 x 384 neurons, from 4 samples: text in 4, ")
    assert "image in 2" in scores
    assert "video" not in scores
    (chosen,) = section("n", results["neurons"]).sentences
    assert chosen.startswith("Of 6 x 384 neurons, 38 of text, ")
    same = section("t", trials([[True] * 4, [True] * 4], ("a", "a", "b", "b")))
    assert same.sentences[1:] == [
        f"Under label {one}, no condition costs any accuracy, on 2 samples." for one in "ab"
    ]
    assert same.run["data"] == "a, b"
    many = section("t", ml.Trials(("p", "q"), (None, None), *conditions(40)))
    heights = [figure.get_size_inches()[1] for figure in many.figures.values()]
    assert heights == [1 + 0.2 * 39] * 2


def conditions(count: int) -> tuple[Any, ...]:
    """The intact model and as many others as make `count`, on two samples."""
    names = ("intact", *(f"off {n}" for n in range(count - 1)))
    return names, np.arange(2 * count).reshape(count, 2) % 3 > 0, -np.ones((count, 2))


def test_an_experiment_says_what_was_run(results: dict[str, Any]) -> None:
    plan = ml.experiments.ratio_plan(results["scores"], [0.05], seeds=[3, 5])
    names = tuple(one.name for one in plan.conditions)
    right = np.ones((len(names), 2), dtype=bool)
    identity = results["scores"].identity
    table = ml.Trials(("p", "q"), ("a", "a"), names, right, -1.0 * right, identity=identity)
    run = section("sweep", ml.experiments.read_ratios(table, plan)).run
    assert (run["model"], run["seeds"], run["samples"]) == ("shapes", "3, 5", "2")
    assert run["weights"] == identity.fingerprint


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

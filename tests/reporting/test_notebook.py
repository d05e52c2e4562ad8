"""What a notebook shows of results and figures."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import miner_lens as ml


def scores() -> ml.ImportanceScores:
    return ml.ImportanceScores(torch.rand(5, 2, 2, 6), ["text", "image"], samples=3)


def trials() -> ml.Trials:
    correct = np.array([[True, False], [False, False]])
    return ml.Trials(("a", "b"), (None, None), ("nothing", "<image>"), correct, -1.0 * correct)


RESULTS = {
    "scores": scores,
    "selection": lambda: scores().select(ratio=0.5),
    "neurons": lambda: ml.NeuronSet([(0, 1), (1, 4)], layers=2, neurons=6),
    "trials": trials,
}


@pytest.mark.parametrize("kind", RESULTS)
def test_results_show_a_table(kind: str) -> None:
    result = RESULTS[kind]()
    html = result._repr_html_()
    assert type(result).__name__ in html
    assert "<image>" not in html
    heads = len(
        list(filter(None, [*result.overview().columns.names, result.overview().index.name]))
    )
    assert html.count("<tr") == len(result.overview()) + 1 + heads


def test_overviews_say_what_there_is() -> None:
    found = scores()
    overview = found.overview()
    assert list(overview["samples"]) == [3, 3]
    assert overview.loc["image", "max"] == pytest.approx(found["image"][2].mean().item())
    selection = found.select(ratio=0.5).overview()
    assert list(selection["neurons"]) == [3, 3]
    assert list(selection["share"]) == [0.25, 0.25]
    assert not len(ml.Selection().overview())
    assert list(trials().overview()["correct"]) == [0.5, 0.0]


def test_figures_show_themselves() -> None:
    """Also where nobody has told the notebook of matplotlib."""
    pytest.importorskip("matplotlib")
    figure: Any = ml.plots.neurons_by_layer(scores().select(ratio=0.5))
    assert figure._repr_png_().startswith(b"\x89PNG")
    formatters = pytest.importorskip("IPython.core.formatters")
    shown, _ = formatters.DisplayFormatter().format(figure)
    assert shown["image/png"].startswith(b"\x89PNG")
    shown, _ = formatters.DisplayFormatter().format(scores())
    assert "<table" in shown["text/html"]

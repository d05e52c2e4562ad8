"""A paper's experiments, run from one description; stopped, they go on to the same tables."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

import miner_lens as ml
from miner_lens.experiments import protocol
from miner_lens.experiments.protocol import MINER, STAND_INS, Source, reproduce
from tests.calls import calls_of
from tests.experiments.test_trials_kept import killed_after, same
from tests.running.test_distributed import in_a_new_process
from tests.test_cli import call

# As MINER's, and smaller.
SMALL = replace(
    MINER,
    ratios=(0.02,),
    strategies=("LA_MU",),
    values=("zero",),
    seeds=(0,),
    max_new_tokens=4,
)
EXPERIMENTS = ("ablation-table", "ratio-sweep", "selection-grid", "ablation-values")


def test_models_are_asked_about_what_they_perceive(shapes: Any) -> None:
    asked = {source.name: source.samples for source in MINER.sources(shapes)}
    assert asked == {"textvqa": 5000, "coco_caption": 5000, "mmlu": 14042, "msvd_qa": 13157}
    hears = ml.load("speech", device="cpu")
    assert [one.name for one in MINER.sources(hears)] == ["mmlu", "librispeech", "vocalsound"]
    with pytest.raises(ValueError, match="MINER asks about audio; the model has no such"):
        replace(MINER, data=MINER.data[-1:]).sources(shapes)
    with pytest.raises(ValueError, match="No data sets stand in for MINER's on 'planted'"):
        MINER.on("planted")
    for organism, sources in STAND_INS.items():
        assert MINER.on(organism).data == sources
        assert MINER.on(organism).max_new_tokens == 8
        assert all(len(source.load(limit=2)) == 2 for source in sources)


def test_data_come_from_the_root_or_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(protocol.datasets, "load", lambda *one: asked.append(one) or [])
    (tmp_path / "mmlu").mkdir()
    Source("mmlu", 9, "containment").load(None, tmp_path)
    Source("vocalsound", 9, "containment", "audio", split="all").load(20, tmp_path)
    Source("easy-vqa", 9, "exact_match", ask="text").load(4)
    assert asked == [
        ("mmlu", None, 9, None, tmp_path / "mmlu"),
        ("vocalsound", "all", 9, None, None),
        ("easy-vqa", None, 4, "text", None),
    ]
    with pytest.raises(FileNotFoundError, match=r"no folder .*nowhere.*a folder for each data"):
        Source("mmlu", 9, "containment").load(None, tmp_path / "nowhere")


def test_each_data_set_has_its_own_metric() -> None:
    judge = protocol.ByLabel((("a", "exact_match"), ("b", "containment")))
    samples = [ml.Sample((), "red", "q", label=label) for label in "ab"]
    assert [judge(sample, "dark red") for sample in samples] == [0.0, 1.0]


def everything(folder: Path) -> tuple[dict[str, Any], int]:
    """The results of the small protocol, and how often the model ran for them."""
    model = ml.load("shapes", device="cpu")
    with calls_of(model.original_model) as passes:
        found = reproduce(model, SMALL.on("shapes"), folder, 2, batch_size=2, progress=False)
    return found, len(passes)


def killed_and_continued(folder: Path) -> None:
    ml.trials.__globals__["WINDOW"] = 3
    protocol.first_cards = lambda *_: {}  # which take long, and are made anew each time
    whole, all_passes = everything(folder / "whole")
    for units in (0, 3):  # when all is mined; within the second of the tables
        child = os.fork()
        if child == 0:
            killed_after(units)
            everything(folder / "killed")
            os._exit(0)
        assert os.waitpid(child, 0)[1] == signal.SIGKILL
    continued, passes = everything(folder / "killed")
    assert 0 < passes < all_passes
    assert continued["scores"].values.equal(whole["scores"].values)
    for name in EXPERIMENTS:
        file = f"trials/{name}.safetensors"
        same(*(ml.Trials.load(folder / where / file) for where in ("whole", "killed")))
        pd.testing.assert_frame_equal(continued[name].frame, whole[name].frame, check_exact=True)
    again, passes = everything(folder / "killed")
    assert passes == 0
    assert again["ablation-table"].summary == whole["ablation-table"].summary


def test_killed_and_continued(tmp_path: Path) -> None:
    in_a_new_process(killed_and_continued, tmp_path)


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "MINER", SMALL)
    out = tmp_path / "out"
    shown = call("reproduce", "miner", "--model", "shapes", "--out", out, "--limit", 3)
    for sentence in ("On easy-vqa-image, all", "combinations of strategy", "The report is"):
        assert sentence in shown
    names = {one.relative_to(out).as_posix() for one in out.rglob("*.*")}
    for name in EXPERIMENTS:
        wanted = {f"{name}.{kind}" for kind in ("csv", "png", "safetensors")}
        assert wanted | {f"trials/{name}.safetensors"} <= names
        table = ml.Trials.load(out / "trials" / f"{name}.safetensors")
        assert set(table.labels) == {"easy-vqa-image", "easy-vqa-text"}
        assert table.answers is not None
        assert len(table.samples) == 6
    scores = ml.ImportanceScores.load(out / "scores.safetensors")
    parts = [out / "scores" / f"easy-vqa-{ask}.safetensors" for ask in ("image", "text")]
    mean = ml.ImportanceScores.mean([ml.ImportanceScores.load(part) for part in parts])
    assert scores.values.equal(mean.values)
    for strategy in SMALL.strategies:
        for modality, neurons in scores.select(0.02, strategy).items():
            saved = out / "neurons" / f"{strategy}-{modality}.safetensors"
            assert ml.NeuronSet.load(saved) == neurons
    page = (out / "report.html").read_text()
    assert "MINER on shapes" in page
    assert all(name in page for name in EXPERIMENTS)
    record = json.loads((out / "protocol.json").read_text())
    assert record["settings"]["ratios"] == [0.02]
    assert record["data"]["easy-vqa-text"][0] == 3
    assert record["versions"]["torch"]
    cards = [ml.NeuronCard.load(path) for path in sorted((out / "cards").iterdir())]
    assert page.count("The neuron's card") == len(cards) == 3
    for card in cards:
        ranks = card.frame[card.frame["metric"] == "attn_k"].set_index("name")["rank"]
        assert ranks.min() == 1
    other = call("reproduce", "miner", "--model", "shapes", "--out", out, "--limit", 2, code=2)
    assert "holds the protocol of another data" in " ".join(other.split())

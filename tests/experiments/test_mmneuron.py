"""MMNeuron's protocol on `shapes`: its steps, and that it goes on where it was stopped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from typer.testing import CliRunner

import miner_lens as ml
from miner_lens.cli import app
from miner_lens.experiments import MMNeuron, mmneuron

TRIED = 3
HOW: dict[str, Any] = {"tried": TRIED, "top_rate": 0.05, "seeds": 1, "progress": False}


@pytest.fixture(scope="module")
def data() -> dict[str, Any]:
    return {name: ml.datasets.load(name, limit=9) for name in ("easy-vqa", "digits")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("mmneuron")


@pytest.fixture(scope="module")
def found(shapes: Any, data: Any, folder: Path) -> MMNeuron:
    return mmneuron(shapes, data, folder, **HOW)


def test_its_steps_are_those_by_hand(shapes: Any, data: Any, found: MMNeuron) -> None:
    assert list(found.counts) == ["llm", "vision", "projector"]
    counted = {name: some[:-TRIED] for name, some in data.items()}
    counts = ml.run(shapes, counted, ml.DomainAnalyzer("vision"), batch_size=8, progress=False)
    assert found.counts["vision"].over_zero.equal(counts.over_zero)
    assert dict(found.selections["vision"]) == dict(counts.select(0.05))
    assert found.layers["vision"].frame["neurons"].sum() == sum(
        map(len, found.selections["vision"].values())
    )
    assert set(found.matrix.trials.labels) == {"easy-vqa", "digits"}
    assert len(found.matrix.trials.samples) == 2 * TRIED
    lens = ml.run(shapes, data["digits"][-TRIED:], ml.LogitLensAnalyzer(), progress=False)
    rows = found.entropy.query("domain == 'digits' and modality == 'image'")
    assert rows["mean"].tolist() == pytest.approx(lens.of("image").mean(0).tolist(), abs=1e-4)
    for part in ("vision: Of the neurons", "cost their own domain more", "On digits, entropy"):
        assert part in found.summary


def test_it_goes_on_from_what_is_there(
    shapes: Any, data: Any, found: MMNeuron, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "lens-digits.safetensors").unlink()
    asked: list[Any] = []
    own = mmneuron.__globals__["run"]

    def watched(model: Any, some: Any, *analyzers: Any, **options: Any) -> Any:
        asked.append(some)
        return own(model, some, *analyzers, **options)

    monkeypatch.setitem(mmneuron.__globals__, "run", watched)
    again = mmneuron(shapes, data, folder, **HOW)
    assert len(asked) == 1
    assert again.summary == found.summary
    assert again.entropy.equals(found.entropy)
    with pytest.raises(ValueError, match="protocol of another settings"):
        mmneuron(shapes, data, folder, **HOW | {"seeds": 2})
    with pytest.raises(ValueError, match="protocol of another data"):
        mmneuron(shapes, {**data, "digits": data["digits"][1:]}, folder, **HOW)


def test_what_cannot_be(shapes: Any, data: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there are 1 domains and 3 samples"):
        mmneuron(shapes, {"digits": data["digits"]}, tmp_path, **HOW)
    with pytest.raises(ValueError, match="has 3 samples; 3 are tried"):
        mmneuron(shapes, {**data, "digits": data["digits"][:3]}, tmp_path, **HOW)
    assert not list(tmp_path.iterdir())


def test_by_the_command(tmp_path: Path) -> None:
    small = ["--limit", 4, "--tried", 2, "--seeds", 1, "--top-rate", 0.05, "--out", tmp_path]
    arguments = ["reproduce", "mmneuron", "--model", "shapes", *small]
    shown = CliRunner().invoke(app, list(map(str, arguments)))
    assert shown.exit_code == 0, shown.output
    assert "On digits, entropy changes course" in shown.output
    assert set(pd.read_csv(tmp_path / "entropy.csv")["domain"]) == {"easy-vqa", "digits"}
    for name in ("layers-llm", "entropy-image"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "report.html").read_text()
    for name in ("neurons of the vision", "layers of the llm", "costs", "lens on digits"):
        assert f">{name}</h2>" in page
    again = CliRunner().invoke(app, list(map(str, arguments)))
    (last,) = [line for line in shown.output.splitlines() if line.startswith("On digits")]
    assert last in again.output

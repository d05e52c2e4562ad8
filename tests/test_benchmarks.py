"""The benchmark compares like with like, measures what it says, and keeps what it measured."""

from __future__ import annotations

import itertools
import json
import re
from collections import Counter
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

import miner_lens as ml
from benchmarks import __main__ as command
from benchmarks import (
    comparisons,
    families,
    lines,
    measure,
    models,
    organisms,
    preparing,
    scaling,
    tables,
)
from benchmarks.breakdown import breakdown
from benchmarks.catalogue import catalogue
from benchmarks.published import naive, published
from benchmarks.results import File, Result, Target
from miner_lens.cli import app

SHAPES = {
    "vision": (models.Shape("small", "qwen2_vl", 64, 96, 4, 2), 150),
    "audio": (models.Shape("small", "qwen2_audio", 64, 96, 4, 4), 790),
}


@pytest.fixture(scope="module", params=list(SHAPES))
def case(request: pytest.FixtureRequest) -> tuple[Any, ...]:
    """A plain model, a bridge on the same weights, and a batch of two prompts."""
    shape, pos = SHAPES[request.param]
    plain = models.build(shape, layers=2)
    bridge: Any = ml.wrap(models.twin(plain))
    return plain, bridge, *models.prompt(shape, pos, batch=2)


def test_the_published_procedure_gives_the_scores_of_mining(case: tuple[Any, ...]) -> None:
    plain, bridge, inputs, masks = case
    scores = ml.mine(bridge, [(inputs, masks)], progress=False)
    torch.testing.assert_close(published(plain, inputs, masks), scores.values, atol=1e-5, rtol=0)
    assert plain.get_decoder().config._attn_implementation == "sdpa"


def test_the_naive_way_gives_the_scores_of_causal_mining(case: tuple[Any, ...]) -> None:
    _, bridge, inputs, masks = case
    scores = ml.mine(bridge, [(inputs, masks)], attention="causal", progress=False)
    torch.testing.assert_close(naive(bridge, inputs, masks), scores.values, atol=1e-5, rtol=0)


def test_both_ways_of_mining_photographs_give_the_same(shapes: Any) -> None:
    scores = [workload() for workload in preparing.workloads(shapes, 3)]
    assert torch.equal(scores[0].values, scores[1].values)
    assert scores[0].samples == 3


def test_a_twin_shares_weights_and_logits(case: tuple[Any, ...]) -> None:
    plain, bridge, inputs, _ = case
    pointers = [{p.data_ptr() for p in m.parameters()} for m in (plain, bridge.original_model)]
    assert pointers[0] == pointers[1]
    with torch.no_grad():
        logits = [m(**inputs, use_cache=False).logits for m in (plain, bridge.original_model)]
    assert torch.equal(*logits)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in plain.modules())


@pytest.mark.parametrize("pos", [150, 305, 1246, 4096, 8192])
def test_prompts_have_the_length_asked_for(pos: int) -> None:
    inputs, masks = models.prompt(SHAPES["vision"][0], pos, batch=1)
    assert inputs["input_ids"].shape == (1, pos)
    assert models.TEXT_TOKENS <= pos - int(masks["image"].sum()) < models.TEXT_TOKENS + pos**0.5


def test_workloads_are_called_in_turn() -> None:
    calls: list[str] = []
    both = {name: lambda name=name: calls.append(name) for name in "ab"}
    times = measure.in_turn(both, runs=3)
    assert "".join(calls) == "ab" + "ab" + "ba" + "ab"
    assert [len(each) for each in times.values()] == [3, 3]


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 8])
def test_each_workload_is_as_often_in_each_place_and_after_each_other(count: int) -> None:
    names = "abcdefgh"[:count]
    orders = [measure.order(names, run) for run in range(2 * count)]
    places = Counter((name, place) for one in orders for place, name in enumerate(one))
    assert len(places) == count**2
    assert set(places.values()) == {2}
    pairs = Counter(pair for one in orders for pair in itertools.pairwise(one))
    assert len(pairs) == count * (count - 1)
    assert set(pairs.values()) <= {2}


def test_ratios_are_taken_run_by_run() -> None:
    spread = measure.ratio([2, 30, 400, 8, 10], [1, 10, 100, 4, 5])
    assert (spread.median, spread.low, spread.high, spread.runs) == (2, 2, 3, 5)


def test_smaller_ones_are_called_first() -> None:
    called: list[str] = []
    small, large = ({"a": partial(called.append, name)} for name in ("small", "large"))
    times = measure.in_turn(large, runs=2, first=small)
    assert called == ["small", "large", "large"]
    assert len(times["a"]) == 2


def test_every_experiment_of_the_command_has_a_line() -> None:
    made = [
        one.name or one.callback.__name__.replace("_", "-")
        for one in app.registered_commands
        if one.callback is not None
    ]
    asked = {line.arguments[0] for line in lines.lines("shapes")}
    method = {"demo", "info", "mine", "select", "ablate", "report", "layers"}
    assert asked == {*made, "reproduce"} - method
    named = [line.name for line in lines.lines("shapes")]
    assert len(set(named)) == len(named)


def test_exponents_are_fitted() -> None:
    times = {size: [3 * size**1.5, 5 * size**1.5] for size in (1.0, 2.0, 4.0)}
    assert measure.exponent([1.0, 2.0, 4.0], times).median == pytest.approx(1.5)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux only")
def test_peak_memory_sees_what_is_freed_again() -> None:
    megabytes = 200

    def workload() -> None:
        torch.ones(megabytes * 10**6 // 4)

    assert measure.peak_memory(workload, "cpu") == pytest.approx(megabytes, rel=0.1)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux only")
def test_memory_of_workloads(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def here(arguments: list[str], env: dict[str, str], **options: Any) -> SimpleNamespace:
        """What the other process does, without waiting for it to import torch."""
        assert measure.NO_CACHING.items() <= env.items()
        monkeypatch.setattr("sys.argv", arguments[2:])
        command.main()
        return SimpleNamespace(stdout=capsys.readouterr().out)

    monkeypatch.setattr("subprocess.run", here)
    setting = comparisons.Setting(SHAPES["vision"][0], 1, 1200, "fp32")
    peaks = comparisons.peaks_of(setting, ["plain", "naive"], "cpu")
    patterns = 4 * 4 * 1200**2 / 1e6  # four heads in fp32
    assert peaks["naive"] > peaks["plain"] + patterns


def test_a_comparison_end_to_end(monkeypatch: pytest.MonkeyPatch) -> None:
    setting = comparisons.Setting(SHAPES["vision"][0], 2, 150, "bf16", batch=2)
    monkeypatch.setattr(comparisons, "peaks_of", lambda _, names, device: dict.fromkeys(names, 1.0))
    rows = [
        comparisons.Row(top, top, "plain", Target(1e9), Target(150))
        for top in ("mine", "published", "naive", "ablate")
    ]
    rows.append(comparisons.Row("memory", "mine", "plain", timed=False))
    group = comparisons.Comparison(setting, tuple(rows))
    ticks: list[None] = []
    done = list(group.measure(group.names(), 2, "cpu", lambda: ticks.append(None)))
    assert [result.name for result in done] == group.names()
    assert len(ticks) == group.steps(group.names(), 2)
    for result in done[:4]:
        assert result.value is not None
        assert result.value.runs == 2
        assert result.to_dict()["met"] is True
        assert result.to_dict()["extra_met"] is True
    assert done[4].value is None
    assert done[4].to_dict()["met"] is None


def test_a_table_end_to_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every way gives the same table, and the rows say how they compare."""
    size = tables.Size("shapes", conditions=3, samples=2)
    made = tables.workloads(size, "cpu")
    found = {name: np.asarray(workload(), dtype=float) for name, workload in made.items()}
    for name in ("answers", tables.PUBLISHED):
        np.testing.assert_array_equal(found[name], found["trials"])
    assert found["trials"][0].all()
    assert not found["trials"][-1].any()  # nothing but modality-specific neurons is on
    monkeypatch.setattr(tables, "workloads", lambda *_: made)
    peaks = {"trials": 110.0, "answers": 130.0, tables.PUBLISHED: 100.0}
    monkeypatch.setattr(tables, "peak_of", lambda size, name, device: peaks[name])
    group = tables.Table(size)
    ticks: list[None] = []
    done = list(group.measure(group.names(), 1, "cpu", lambda: ticks.append(None)))
    assert len(ticks) == group.steps(group.names(), 1)
    assert [result.name for result in done] == group.names()
    assert [result.to_dict()["extra_met"] for result in done] == [True, False]
    for result in done:
        assert result.value is not None
        ours, theirs = (result.seconds[one] for one in (tables.ROWS[result.name], "published"))
        assert result.value.median == pytest.approx(theirs / ours)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux only")
def test_memory_of_a_table(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def here(arguments: list[str], env: dict[str, str], **options: Any) -> SimpleNamespace:
        """What the other process does, without waiting for it to import torch."""
        monkeypatch.setattr("sys.argv", arguments[2:])
        command.main()
        return SimpleNamespace(stdout=capsys.readouterr().out)

    def workloads(size: tables.Size, device: str) -> dict[str, Any]:
        assert size == tables.Size("shapes", 2, 64)
        return {"trials": lambda: torch.ones(10**8 // 4)}

    monkeypatch.setattr("subprocess.run", here)
    monkeypatch.setattr(tables, "workloads", workloads)
    before, _ = measure.memory(lambda: None, "cpu")
    peak = tables.peak_of(tables.Size("shapes", 20, 64), "trials", "cpu")
    assert peak == pytest.approx(before + 100, abs=30)


def test_scaling_end_to_end() -> None:
    group = scaling.Scaling("layers", (1, 2), {"samples": 1, "layers": 1, "T": 60, "neurons": 32})
    done = list(group.measure(group.names(), 1, "cpu", lambda: None))
    assert [result.name for result in done] == ["scaling-layers-mine", "scaling-layers-plain"]
    assert all(result.value is not None for result in done)


def test_the_file_is_complete_after_every_row(tmp_path: Path) -> None:
    path, here = tmp_path / "figures.json", {"torch": "2", "threads": 2}
    spread = measure.Spread(1.3, 1.2, 1.4, 5)
    File(path, here).add(Result("a", "mining / plain", value=spread, target=Target(1.25)))
    file = File(path, here)
    peaks = {"mine": 330.0, "plain": 240.4}
    file.add(Result("b", "memory", peak_mb=peaks, extra_mb=89.6, extra_target=Target(150)))
    rows = json.loads(path.read_text())["rows"]
    assert (rows["a"]["met"], rows["b"]["extra_met"], rows["b"]["met"]) == (False, True, None)
    assert list(tmp_path.iterdir()) == [path]
    text = file.markdown(["b", "a"]).splitlines()
    assert text[2].startswith("| b |")
    assert "| 330 / 240 | 90 | <= 150 met |" in text[2]
    assert "1.3 (1.2-1.4)" in text[3]
    console = Console(width=200, record=True, quiet=True)
    console.print(file.table(["a", "b"]))
    with pytest.raises(ValueError, match=r"another environment.*threads.*--out"):
        File(path, here | {"threads": 1})


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_catalogue_has_the_rows_that_were_promised(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("benchmarks.catalogue.fast_bfloat16", lambda device: True)
    groups = catalogue(device)
    names = [name for group in groups for name in group.names()]
    assert len(set(names)) == len(names)
    for dtype in ("fp32", "bf16"):
        for what in (
            "mine-plain",
            "attention-free-plain",
            "published-plain",
            "published-mine",
            "naive-plain",
        ):
            assert {f"{what}-1246-{dtype}", f"{what}-4096-{dtype}"} <= set(names)
        for where in ("batch1", "batch4", "batch16", "audio"):
            assert f"mine-plain-{where}-{dtype}" in names
        assert f"memory-8192-{dtype}" in names
    assert {"published-trials", "published-answers"} <= set(names)
    assert not any(group.slow for group in groups if not isinstance(group, tables.Table))


def test_without_bfloat16_instructions_the_longest_rows_wait_to_be_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("benchmarks.catalogue.fast_bfloat16", lambda device: False)
    groups = catalogue("cpu")
    usual = command.choose(groups, None)
    assert "mine-plain-4096-bf16" in usual
    assert "published-plain-4096-bf16" not in usual
    assert "published-plain-4096-bf16" in command.choose(groups, ["published-*"])
    with pytest.raises(SystemExit, match="No row matches nothing"):
        command.choose(groups, ["nothing"])


def test_rows_are_measured_and_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "figures.json"
    arguments = ["--rows", "startup-help", "--runs", "1", "--out", str(out)]
    monkeypatch.setattr("sys.argv", ["benchmarks", *arguments])
    command.main()
    assert "startup-help" in capsys.readouterr().out
    written = json.loads(out.read_text())
    assert list(written["rows"]) == ["startup-help"]
    assert str(Path.home()) not in json.dumps(written["environment"])


def test_the_breakdown_names_the_parts_of_mining() -> None:
    setting = comparisons.Setting(SHAPES["vision"][0], 1, 150, "fp32")
    times = breakdown(comparisons.workloads(setting, ["mine"], "cpu")["mine"])
    parts = {part for part, _ in times}
    assert {"model", "statistics", "normalise"} <= parts
    assert all(taken >= 0 for taken in times.values())


def test_the_page_on_an_organism_continues_where_it_was_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(*parts: str) -> str:
        folders = [f"--{name}={tmp_path / name}" for name in ("out", "images", "work")]
        sizes = ["--mined", "20", "--tried", "2"]
        monkeypatch.setattr(
            "sys.argv", ["organisms", "shapes", *folders, *sizes, "--parts", *parts]
        )
        organisms.main()
        return (tmp_path / "out" / "shapes.md").read_text()

    assert re.search(r"## Shared, where, and stable\?\n\n.*Jaccard", run("selected"), re.DOTALL)
    kept = tmp_path / "work" / "shapes" / "selected.md"
    kept.write_text("kept")
    page = run("selected", "lens")
    assert "kept" in page
    assert "image tokens: entropy changes course at layer" in page


@pytest.mark.parametrize(
    ("name", "sites", "missing"),
    [
        # One norm for attention and MLP.
        ("Cohere2Vision", "llm 2 x 48, vision 3 x 40, projector 1 x 8", ""),
        # The first layer has no experts.
        ("Glm4vMoe", "llm 2 x 96 (layer 0: 48), vision 3 x 32, projector 1 x 40", "shared"),
        # Experts of its own, which the layer knows by their class.
        ("Ernie4_5_VLMoe", "vision 3 x 40, projector 1 x 80", "no gated MLP"),
        # Two towers, of which the model names one.
        ("VideoLlava", "llm 2 x 48, vision 3 x 40, projector 1 x 32", ""),
    ],
)
def test_families(name: str, sites: str, missing: str) -> None:
    (family,) = (one for one in families.FAMILIES if one.name.startswith(name))
    row = families.try_family(family)
    assert (row.sites, row.logits) == (sites, "0")
    assert missing in row.refused
    assert bool(row.refused) == bool(missing)
    held = [float(value) for value in (row.scores, row.off) if value]
    assert len(held) == 2 * sites.startswith("llm")
    assert all(value <= 1e-5 for value in held)

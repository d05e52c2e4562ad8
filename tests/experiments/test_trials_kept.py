"""Tables that are stopped and continued, shared by processes, and kept in files."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest

import miner_lens as ml
from miner_lens import files
from miner_lens.experiments import asking, scored
from tests.calls import calls_of
from tests.running.test_distributed import everywhere, in_a_new_process, prepare


class StopHereError(Exception):
    pass


def conditions_of(model: Any) -> list[ml.Condition]:
    nothing = ml.NeuronSet.of([], model)
    return [ml.Condition("intact"), ml.Condition("off", ml.NeuronSet.random(300, like=nothing))]


def table_of(model: Any, data: Any, **options: Any) -> ml.Trials:
    return ml.trials(model, data, conditions_of(model), 2, False, **options)


def same(one: ml.Trials, two: ml.Trials) -> None:
    pd.testing.assert_frame_equal(one.to_frame(), two.to_frame(), check_exact=True)
    assert one.identity == two.identity


@pytest.fixture
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ml.trials.__globals__, "WINDOW", 3)


def killed_after(units: int) -> None:
    """Let this process be killed when it has done so many units."""
    run, done = asking.Asking.run, []

    def counted(self: Any, asked: Any) -> int:
        if len(done) == units:
            os.kill(os.getpid(), signal.SIGKILL)
        done.append(1)
        return int(run(self, asked))

    asking.Asking.run = counted


def processes_share_and_are_killed(folder: Path) -> None:
    model, data = prepare(11)
    ml.trials.__globals__["WINDOW"] = 3
    alone = table_of(model, data)

    def shared(rank: int) -> bool:
        same(table_of(model, data, checkpoint=folder / "two"), alone)
        return True

    assert everywhere(2, shared, folder / "told") == [True, True]
    # What two processes have kept, one reads without a pass.
    with calls_of(model.original_model) as passes:
        same(table_of(model, data, checkpoint=folder / "two"), alone)
    assert not passes
    # Killed after each of its units, and continued.
    for unit in (1, 2):
        child = os.fork()
        if child == 0:
            killed_after(unit)
            table_of(model, data, checkpoint=folder / "one", checkpoint_every=0)
            os._exit(0)
        assert os.waitpid(child, 0)[1] == signal.SIGKILL
    (kept,) = (folder / "one").glob("*.safetensors")
    assert 0 < len(files.read(kept, "run")[0]["items"]) < len(data)
    same(table_of(model, data, checkpoint=folder / "one"), alone)


def test_processes_share_and_are_killed(tmp_path: Path) -> None:
    in_a_new_process(processes_share_and_are_killed, tmp_path)


def test_a_table_that_was_stopped_continues(
    shapes: Any, tmp_path: Path, small_units: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = ml.datasets.load("easy-vqa", limit=8, ask="both")
    whole = table_of(shapes, data)

    def until(samples: int) -> Any:
        yield from data[:samples]
        raise StopHereError

    for stop in (4, 7):
        with pytest.raises(StopHereError):
            table_of(shapes, until(stop), checkpoint=tmp_path, checkpoint_every=0)
    same(table_of(shapes, data, checkpoint=tmp_path), whole)
    other = [*data[:3], replace(data[3], answers=("never",)), *data[4:]]
    with pytest.raises(ValueError, match="over other data"):
        table_of(shapes, other, checkpoint=tmp_path)
    with pytest.raises(ValueError, match="holds another run"):
        ml.trials(shapes, data, conditions_of(shapes)[::-1], 2, False, checkpoint=tmp_path)
    changed = [ml.Condition("intact"), ml.Condition("off", ml.NeuronSet.of([(0, 1)], shapes))]
    with pytest.raises(ValueError, match="holds another run"):
        ml.trials(shapes, data, changed, 2, False, checkpoint=tmp_path)
    with pytest.raises(ValueError, match="holds another run"):
        table_of(shapes, data, checkpoint=tmp_path, metric=exactly)
    monkeypatch.setitem(ml.trials.__globals__, "TABLE", 0)
    with pytest.raises(ValueError, match="holds another run"):
        table_of(shapes, data, checkpoint=tmp_path)


def exactly(sample: ml.Sample, answer: str) -> float:
    return float(answer == sample.answers[0])


STRICTNESS = SimpleNamespace(by=1.0)


def strictly(sample: ml.Sample, answer: str) -> float:
    return float(answer == sample.answers[0]) * STRICTNESS.by


def test_a_metric_is_told_by_what_it_reads(
    shapes: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = ml.datasets.load("easy-vqa", limit=2)
    table_of(shapes, data, checkpoint=tmp_path, metric=strictly)
    table_of(shapes, data, checkpoint=tmp_path, metric=strictly)
    monkeypatch.setattr(STRICTNESS, "by", 0.5)
    with pytest.raises(ValueError, match="holds another run: of other metric"):
        table_of(shapes, data, checkpoint=tmp_path, metric=strictly)
    monkeypatch.setattr(STRICTNESS, "by", object())
    with pytest.raises(ValueError, match=r"tell metric from another: it reads STRICTNESS\.by, and"):
        table_of(shapes, data, checkpoint=tmp_path / "other", metric=strictly)


def test_answers_by_a_metric(shapes: Any, tmp_path: Path) -> None:
    data = ml.datasets.load("easy-vqa", limit=6)
    forced = table_of(shapes, data)
    found = table_of(shapes, data, metric=exactly, max_new_tokens=4)
    table = found.to_frame()
    assert list(table.columns) == ["sample", "label", "condition", "answer", "correct", "logprob"]
    assert found.correct.dtype == np.float64
    np.testing.assert_array_equal(found.correct, forced.correct)
    np.testing.assert_array_equal(found.logprob, forced.logprob)
    for name, rows in table.groupby("condition"):
        with next(c for c in conditions_of(shapes) if c.name == name).applied(shapes):
            assert list(rows["answer"]) == list(ml.answers(shapes, data, max_new_tokens=4))
    for name in ("table.parquet", "table.safetensors"):
        found.save(tmp_path / name)
        same(ml.Trials.load(tmp_path / name), found)
    with pytest.raises(ValueError, match=r"gave 7\.0 for the answer"):
        table_of(shapes, data, metric=lambda sample, answer: 7)


def test_what_greedy_decoding_is_known_to_give_is_not_generated(
    shapes: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = ml.datasets.load("easy-vqa", limit=6)
    data[2] = replace(data[2], answers=("a wrong answer",))
    generated: list[int] = []
    generate = asking.generate_from

    def counting(model: Any, inputs: Any, *options: Any) -> Any:
        generated.append(len(inputs["input_ids"]))
        return generate(model, inputs, *options)

    monkeypatch.setattr(asking, "generate_from", counting)

    def asked(*conditions: ml.Condition, tokens: int = 4) -> ml.Trials:
        generated.clear()
        return ml.trials(shapes, data, conditions, 4, False, metric=exactly, max_new_tokens=tokens)

    intact = ml.Condition("intact")
    expected = tuple(ml.answers(shapes, data, max_new_tokens=4))
    assert asked(intact).answers == (expected,)
    assert generated == [1]
    # What is written depends on how long the pass is, or more than the most probable token counts.
    lowest = ml.Condition("min", conditions_of(shapes)[1].neurons, value="min")
    asked(lowest)
    assert sum(generated) == 6
    monkeypatch.setattr(shapes.original_model.generation_config, "repetition_penalty", 1.1)
    asked(intact)
    assert sum(generated) == 6


def test_files(shapes: Any, tmp_path: Path) -> None:
    data = ml.datasets.load("easy-vqa", limit=4)
    found = table_of(shapes, {"pictures": data[:3], "more": data[3:]})
    assert found.labels == ("pictures",) * 3 + ("more",)
    for name in ("table.safetensors", "deep/table.parquet"):
        found.save(tmp_path / name)
        again = ml.Trials.load(tmp_path / name)
        same(again, found)
        assert again.correct.dtype == bool
    found.save_pretrained(tmp_path / "folder")
    same(ml.Trials.from_pretrained(tmp_path / "folder"), found)
    # Others read it, and change it.
    table = pd.read_parquet(tmp_path / "deep" / "table.parquet")
    pd.testing.assert_frame_equal(table, found.to_frame(), check_dtype=False)
    shuffled = table.sample(frac=1, random_state=0)
    shuffled.to_parquet(tmp_path / "theirs.parquet")
    theirs = ml.Trials.load(tmp_path / "theirs.parquet").to_frame()
    keys = ["sample", "condition"]
    pd.testing.assert_frame_equal(
        theirs.sort_values(keys, ignore_index=True),
        found.to_frame().sort_values(keys, ignore_index=True),
    )


def test_bad_files(tmp_path: Path) -> None:
    values = np.zeros((1, 2))
    found = ml.Trials(("a", "b"), (None, "x"), ("intact",), values, values)
    path = tmp_path / "table.parquet"
    with pytest.raises(FileNotFoundError, match="There is no file"):
        ml.Trials.load(path)
    path.write_bytes(b"PAR1")
    with pytest.raises(ValueError, match="not a complete Parquet file"):
        ml.Trials.load(path)
    table = found.to_frame()
    assert ml.Trials.from_frame(table).labels == (None, "x")
    with pytest.raises(ValueError, match="no column 'logprob'"):
        ml.Trials.from_frame(table.drop(columns="logprob"))
    with pytest.raises(ValueError, match=r"3 rows for 2 samples x 1 conditions"):
        ml.Trials.from_frame(pd.concat([table, table[:1]]))
    found.save(path)
    import pyarrow.parquet as parquet

    content = parquet.read_table(path)
    newer = {b"miner_lens": json.dumps({"format": files.FORMAT + 1}).encode()}
    parquet.write_table(content.replace_schema_metadata(newer), path)
    with pytest.raises(ValueError, match=r"Upgrade with pip install -U miner-lens"):
        ml.Trials.load(path)


def test_merging() -> None:
    """However samples are dealt, in whatever order: one table."""
    rows = {n: scored.SampleTrials(f"s{n}", None, [1.0, 0.0], [-n, -2.0 * n]) for n in range(5)}
    tables = []
    for deal in ([[0, 1, 2, 3, 4]], [[4, 1], [], [3, 0, 2]]):
        total = scored.Scored()
        for numbers in deal:
            part = scored.Scored()
            for number in numbers:
                part.add(number, rows[number])
            total.merge_state_dict(part.state_dict())
        copied = scored.Scored()
        copied.load_state_dict(total.state_dict())
        tables.append(copied.table(["a", "b"], True, None))
    same(*tables)
    assert tables[0].samples == ("s0", "s1", "s2", "s3", "s4")
    assert tables[0].logprob[1].tolist() == [0.0, -2.0, -4.0, -6.0, -8.0]
    assert copied.repeated() is None
    copied.add(9, rows[0])
    assert copied.repeated() == "s0"

from __future__ import annotations

import functools
import importlib
import json
import logging
import math
import os
import random
import re
import resource
import subprocess
import sys
import warnings
from dataclasses import dataclass, field, replace
from enum import Enum
from functools import partial
from pathlib import Path
from types import FunctionType
from typing import Any

import numpy as np
import pytest
import torch
import transformer_lens
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from transformer_lens.utilities import get_act_name

import miner_lens as ml
from miner_lens import files
from miner_lens.data.signature import described, item_signature
from miner_lens.models import access
from miner_lens.running import work
from miner_lens.running.checkpoint import KIND, LOCK, NAME, Checkpoint
from miner_lens.running.distributed import Ranks
from miner_lens.running.work import Items, shard

ROOT = Path(__file__).resolve().parents[2]
ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1"}

# Loads everything once; the runs that are killed are forks of this process.
KILLING = """
import json, mmap, os, random, signal, sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
import miner_lens as ml
from tests.running.test_checkpoint import items_in, same

out, kills = Path(sys.argv[1]), int(sys.argv[2])
model = ml.load("shapes", device="cpu")
data = ml.datasets.load("easy-vqa", limit=40, ask="both")
begun = mmap.mmap(-1, 8)  # how many samples the model was given in this process


def count(module, args, inputs):
    rows = len(inputs["input_ids"])
    begun[:] = (int.from_bytes(begun[:], "little") + rows).to_bytes(8, "little")


count.description = "changes nothing"  # whatever it counts in, which no checkpoint could tell
model.original_model.register_forward_pre_hook(count, with_kwargs=True)


def run(folder, batch_size, samples):
    every = 0.0 if samples is None else 1000.0
    return ml.run(
        model, iter(data), ml.ImportanceAnalyzer(), batch_size=batch_size, progress=False,
        checkpoint=folder, checkpoint_every=every, checkpoint_every_samples=samples,
    )


generator = random.Random(0)
report = {"kills": 0, "finished": 0, "resumed": 0, "lost": []}
# How large a batch is, after how many samples to write, and what may be lost: the interval, with
# the pass that was running.
settings = [(3, None, 3), (3, 6, 9), ("auto", None, 32)]
whole = {}
for batch_size, samples, _ in settings:
    start = time.perf_counter()
    whole[batch_size] = run(out / "whole", batch_size, samples)
    seconds = time.perf_counter() - start
    for file in (out / "whole").iterdir():
        file.unlink()
for number, (batch_size, samples, allowed) in enumerate(settings):
    share = kills * (number + 1) // len(settings)
    folder, before, finished = out / f"run-{number}", 0, False
    while report["kills"] < share or not finished:
        if finished:  # before it was killed often enough
            folder, before = out / f"run-{number}-{report['kills']}", 0
        begun[:] = bytes(8)
        child = os.fork()
        if child == 0:
            run(folder, batch_size, samples).save(folder / "scores.safetensors")
            os._exit(0)
        if report["kills"] < share:
            time.sleep(generator.uniform(0, seconds / 2))
            os.kill(child, signal.SIGKILL)
        status = os.waitpid(child, 0)[1]
        finished = status == 0
        if finished:
            scores = ml.ImportanceScores.load(folder / "scores.safetensors")
            same(scores, whole[batch_size])
            assert not list(folder.glob(".rank-*")), list(folder.iterdir())
            report["finished"] += 1
            continue
        assert status == signal.SIGKILL, status
        report["kills"] += 1
        report["resumed"] += before > 0
        kept, reached = items_in(folder), before + int.from_bytes(begun[:], "little")
        assert kept >= before, (kept, before)
        assert kept >= reached - allowed, (kept, reached)
        report["lost"].append(max(0, reached - kept))
        before = kept
print(json.dumps(report))
"""


class StopHereError(Exception):
    pass


def stopping(data: list[ml.Sample], after: int) -> Any:
    yield from data[:after]
    raise StopHereError


def mine(model: Any, data: Any, folder: Path | None = None, **options: Any) -> Any:
    options = {"batch_size": 4, "checkpoint_every": 0.0} | options
    return ml.mine(model, data, progress=False, checkpoint=folder, **options)


def items_in(folder: Path) -> int:
    """How many samples the files in a folder cover."""
    return sum(len(files.read(path, KIND)[0]["items"]) for path in written(folder))


def written(folder: Path) -> list[Path]:
    """The finished files, without the lock."""
    return list(folder.glob("rank-*"))


def same(a: ml.ImportanceScores, b: ml.ImportanceScores) -> None:
    assert torch.equal(a.values, b.values)
    assert torch.equal(a.means, b.means)
    assert (a.samples, a.occurrences, a.skipped, a.identity) == (
        b.samples,
        b.occurrences,
        b.skipped,
        b.identity,
    )


@given(
    total=st.integers(0, 40),
    size=st.integers(1, 5),
    runs=st.lists(
        st.tuples(st.integers(1, 4), st.lists(st.integers(0, 5), min_size=4)), max_size=4
    ),
    walked=st.booleans(),
)
def test_every_item_is_dealt_once(
    total: int, size: int, runs: list[tuple[int, list[int]]], walked: bool
) -> None:
    """Runs with other numbers of ranks, each broken off after some units of each rank."""
    data = [f"item {number}" for number in range(total)]
    done: dict[int, int] = {}
    for world_size, after in [*runs, (3, [100] * 3)]:
        parts: list[dict[int, Any]] = []
        for rank in range(world_size):
            items = Items(iter(data) if walked else data, None)
            units = list(shard(items, size, Ranks(rank, world_size), done))
            assert all(len(unit) <= size for unit in units)
            assert not {number for unit in units for number in unit} & set(done)
            parts += units[: after[rank]]
        done |= {number: item_signature(item) for unit in parts for number, item in unit.items()}
    assert sorted(done) == list(range(total))


@pytest.fixture(scope="module")
def data() -> list[ml.Sample]:
    both = ml.datasets.load("easy-vqa", limit=22, ask="both")
    broken = ml.Sample(
        [{"role": "user", "content": [{"type": "image", "image": "no/such/file"}]}], (), "broken"
    )
    return [*both[:9], broken, *both[9:]]


def test_continues_bit_for_bit(shapes: Any, data: list[ml.Sample], tmp_path: Path) -> None:
    whole = mine(shapes, data, on_error="skip")
    for after in (6, 12, 19):
        with pytest.raises(StopHereError):
            mine(shapes, stopping(data, after), tmp_path, on_error="skip")
    same(mine(shapes, data, tmp_path, on_error="skip"), whole)
    assert whole.skipped == 1


def test_a_finished_run_is_not_run_again(
    shapes: Any, data: list[ml.Sample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = mine(shapes, data[:8], tmp_path)
    monkeypatch.setattr("miner_lens.running.passes.forward", None)
    same(mine(shapes, data[:8], tmp_path), first)


def test_writes_only_when_it_is_time(shapes: Any, data: list[ml.Sample], tmp_path: Path) -> None:
    with pytest.raises(StopHereError):
        mine(shapes, stopping(data, 9), tmp_path / "rarely", checkpoint_every=1000)
    assert not written(tmp_path / "rarely")
    mine(shapes, data[:8], tmp_path / "rarely", checkpoint_every=1000)
    assert len(written(tmp_path / "rarely")) == 1


def test_fifty_kills(tmp_path: Path) -> None:
    command = [sys.executable, "-c", KILLING, str(tmp_path), "50"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=ONE_THREAD)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["kills"] == 50
    assert report["resumed"] >= 10
    assert report["finished"] >= 3


def test_clears_up_after_a_first_write_that_was_cut_off(
    shapes: Any, data: list[ml.Sample], tmp_path: Path
) -> None:
    """Nothing else is in the folder then, so there is nothing to continue, but half a file."""
    half = tmp_path / f".{NAME.format(rank=0, world_size=1)}.half"
    half.write_bytes(b"half")
    same(mine(shapes, data[:4], tmp_path), mine(shapes, data[:4]))
    assert not half.exists()


def test_writes_after_so_many_samples(
    shapes: Any, data: list[ml.Sample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, writes = files.write, []

    def noting(path: Path, kind: str, tensors: Any, metadata: Any) -> None:
        write(path, kind, tensors, metadata)
        writes.append(items_in(tmp_path))

    monkeypatch.setattr(files, "write", noting)
    with pytest.raises(StopHereError):
        ml.run(
            shapes,
            stopping(data[10:], 11),
            ml.ImportanceAnalyzer(),
            batch_size=2,
            progress=False,
            checkpoint=tmp_path,
            checkpoint_every=1000,
            checkpoint_every_samples=3,
        )
    assert writes == [4, 8]


def test_more_data_afterwards(shapes: Any, data: list[ml.Sample], tmp_path: Path) -> None:
    mine(shapes, data[:7], tmp_path)
    more = mine(shapes, data[:9], tmp_path)
    assert more.samples == 9
    torch.testing.assert_close(more.values, mine(shapes, data[:9]).values, atol=1e-6, rtol=0)


class Opened:
    """A data set that makes its samples when asked for them, and counts how often."""

    def __init__(self, samples: list[ml.Sample]) -> None:
        self.samples = samples
        self.asked: list[int] = []

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> ml.Sample:
        self.asked.append(index)
        return self.samples[index]


def test_what_is_done_is_hardly_opened_again(
    shapes: Any, data: list[ml.Sample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("miner_lens.running.work.SPOT_CHECKS", 2)
    mine(shapes, Opened(data[:8]), tmp_path)
    again = Opened(data[:9])
    mine(shapes, again, tmp_path)
    assert again.asked == [0, 4, 8]
    with pytest.raises(ValueError, match="written over other data"):
        mine(shapes, Opened(data[1:9]), tmp_path)


@pytest.mark.parametrize("batch_size", [4, "auto"])
def test_one_changed_word_is_refused(
    shapes: Any, data: list[ml.Sample], tmp_path: Path, batch_size: Any
) -> None:
    with pytest.raises(StopHereError):
        mine(shapes, stopping(data * 3, 66), tmp_path, batch_size=batch_size, on_error="skip")
    other = data * 3
    other[5] = ml.Sample([{"role": "user", "content": "another question"}], (), other[5].id)
    with pytest.raises(ValueError, match="written over other data"):
        mine(shapes, other, tmp_path, batch_size=batch_size, on_error="skip")


def test_samples_of_odd_shape_are_skipped_with_a_checkpoint_too(
    shapes: Any, data: list[ml.Sample], tmp_path: Path
) -> None:
    odd = [ml.Sample([message]) for message in ({"role": "user"}, "words", {"content": [1]})]
    scores = mine(shapes, [data[0], *odd], tmp_path, on_error="skip")  # type: ignore[list-item]
    assert (scores.samples, scores.skipped) == (1, 3)


@pytest.mark.parametrize("damage", ["truncated", "flipped"])
def test_damaged_file(shapes: Any, data: list[ml.Sample], tmp_path: Path, damage: str) -> None:
    with pytest.raises(StopHereError):
        mine(shapes, stopping(data, 8), tmp_path)
    (path,) = written(tmp_path)
    content = bytearray(path.read_bytes())
    if damage == "truncated":
        content = content[: len(content) // 2]
    else:
        content[-100] ^= 1
    path.write_bytes(content)
    with pytest.warns(UserWarning, match=r"What it covers is done again: .*rank-0-of-1"):
        again = mine(shapes, data[:8], tmp_path)
    same(again, mine(shapes, data[:8]))
    assert items_in(tmp_path) == 8


class Numbers(ml.Analyzer[None]):
    """An analyzer with a small state."""

    def points(self, model: Any) -> list[ml.Point]:
        return []

    def see(self, x: torch.Tensor, point: ml.Point, batch: ml.Batch) -> None:
        pass

    def result(self) -> None:
        pass

    @classmethod
    def of(cls, samples: int) -> Numbers:
        analyzer, ids = cls(), torch.zeros(samples, 1, dtype=torch.long)
        batch = ml.Batch({"input_ids": ids}, {"text": ids == 0}, ("name",) * samples)
        analyzer.open(batch, None)
        analyzer.sum("numbers", torch.arange(3.0) * samples)
        analyzer.accept(batch)
        return analyzer


def kept_by(folder: Path, rank: int, world_size: int, state: Numbers) -> Checkpoint:
    path = folder / NAME.format(rank=rank, world_size=world_size)
    return Checkpoint(path, state, {"model": "m"})


def a_file(folder: Path, rank: int, world_size: int, *numbers: int) -> None:
    """Write what a rank has seen of some items."""
    kept = kept_by(folder, rank, world_size, Numbers.of(len(numbers)))
    kept.add({number: f"item {number}" for number in numbers}, 0)
    kept.write()


def taken_over(folder: Path, world_size: int) -> list[int]:
    """The items that rank 0 of a new run takes over, whose state is what it should be."""
    analyzer = Numbers()
    kept = kept_by(folder, 0, world_size, analyzer)
    with kept.reserved():
        assert analyzer.samples == kept.seen == len(kept.done)
        if kept.done:
            assert torch.equal(analyzer["numbers"], torch.arange(3.0) * len(kept.done))
        return sorted(kept.done)


def test_damage_anywhere(tmp_path: Path) -> None:
    """A bit flipped in any byte, or a cut: never taken for a checkpoint, or it changed nothing."""
    a_file(tmp_path, 0, 1, 0, 1)
    (path,) = written(tmp_path)
    good = path.read_bytes()
    damages = [good[:length] for length in range(0, len(good), 7)]
    generator = random.Random(0)
    for place, byte in enumerate(good):
        flipped = bytes([byte ^ 1 << generator.randrange(8)])
        damages.append(good[:place] + flipped + good[place + 1 :])
    refused = 0
    for damage in damages:
        path.write_bytes(damage)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found = taken_over(tmp_path, 1)
        if not found:
            assert "What it covers is done again" in str(caught[0].message)
            refused += 1
            continue
        assert found == [0, 1]
    assert refused >= len(damages) - 2


def test_files_of_other_numbers_of_ranks_are_taken_over(tmp_path: Path) -> None:
    a_file(tmp_path, 0, 3, 0, 3)
    a_file(tmp_path, 1, 3, 1, 4, 7)
    a_file(tmp_path, 0, 2, 2)
    own = tmp_path / NAME.format(rank=0, world_size=2)
    old = {path: path.read_bytes() for path in written(tmp_path) if path != own}
    everything = [0, 1, 2, 3, 4, 7]
    assert taken_over(tmp_path, 2) == everything
    assert written(tmp_path) == [own]
    # Killed before the files that were merged could be removed: they are not merged once more.
    for path, content in old.items():
        path.write_bytes(content)
    assert taken_over(tmp_path, 2) == everything
    # A rank that has not noticed yet that its run is over writes once more.
    a_file(tmp_path, 1, 2, 0, 3, 6)
    assert taken_over(tmp_path, 2) == everything
    assert written(tmp_path) == [own]
    # What several ranks have written, with as many again.
    a_file(tmp_path, 1, 2, 5, 6)
    assert taken_over(tmp_path, 2) == list(range(8))
    assert taken_over(tmp_path, 1) == list(range(8))
    assert written(tmp_path) == [tmp_path / NAME.format(rank=0, world_size=1)]


def test_full_disk(
    shapes: Any, data: list[ml.Sample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The system refuses to write on in the middle of the second file."""
    real, calls = files.save_file, []

    def fill(tensors: Any, path: str, **options: Any) -> None:
        calls.append(path)
        if len(calls) > 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
        real(tensors, path, **options)

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    monkeypatch.setattr(files, "save_file", fill)
    try:
        with pytest.raises(OSError, match=r"rank-0.*could not be written .*before is intact"):
            mine(shapes, data[:9], tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert len(calls) == 2
    assert {path.name for path in tmp_path.iterdir()} == {
        NAME.format(rank=0, world_size=1),
        LOCK,
    }
    monkeypatch.undo()
    same(mine(shapes, data[:9], tmp_path), mine(shapes, data[:9]))


def test_two_runs_at_once_are_refused(shapes: Any, data: list[ml.Sample], tmp_path: Path) -> None:
    def meanwhile() -> Any:
        yield from data[:5]
        with pytest.raises(ValueError, match=f"Another run is using {tmp_path}"):
            mine(shapes, data[:8], tmp_path)
        yield from data[5:8]

    same(mine(shapes, meanwhile(), tmp_path), mine(shapes, data[:8]))
    same(mine(shapes, data[:8], tmp_path), mine(shapes, data[:8]))


def test_analyzers_must_be_new(shapes: Any, data: list[ml.Sample], tmp_path: Path) -> None:
    analyzer = ml.ImportanceAnalyzer()
    ml.run(shapes, data[:2], analyzer, progress=False)
    with pytest.raises(ValueError, match="has seen 2 samples already"):
        ml.run(shapes, data[:2], analyzer, progress=False, checkpoint=tmp_path)


def test_other_runs_are_refused(shapes: Any, data: list[ml.Sample], tmp_path: Path) -> None:
    with pytest.raises(StopHereError):
        mine(shapes, stopping(data, 8), tmp_path)
    for options in ({"attention": "causal"}, {"batch_size": 2}, {"on_error": "skip"}):
        with pytest.raises(ValueError, match="holds another run"):
            mine(shapes, data[:8], tmp_path, **options)
    for other in (data[1:9], data[:3]):
        with pytest.raises(ValueError, match="written over other data"):
            mine(shapes, other, tmp_path)
    half = ml.load("shapes", device="cpu")
    with torch.no_grad():
        half.original_model.get_decoder().layers[0].mlp.gate_proj.weight.mul_(2)
    with pytest.raises(ValueError, match="holds another run"):
        mine(half, data[:8], tmp_path)
    same(mine(shapes, data[:8], tmp_path), mine(shapes, data[:8]))


class Above(ml.Analyzer[torch.Tensor]):
    """How often X is above thresholds, which it keeps under a private name."""

    def __init__(self, thresholds: Any, by: Any = torch.sub) -> None:
        self._thresholds, self._by = thresholds, by

    def points(self, model: Any) -> list[ml.Point]:
        return ml.activation_points(model)[:1]

    def see(self, x: torch.Tensor, point: ml.Point, batch: ml.Batch) -> None:
        self.sum("above", (self._by(x[batch.real], self._thresholds) > 0).sum())

    def result(self) -> torch.Tensor:
        found: torch.Tensor = self["above"]
        return found


def painted(sample: ml.Sample, colour: str) -> ml.Sample:
    image, text = sample.messages[0]["content"]
    other = Image.new("RGB", (64, 64), colour)
    return replace(
        sample, messages=[{"role": "user", "content": [{**image, "image": other}, text]}]
    )


def test_another_experiment_is_not_continued(
    shapes: Any, data: list[ml.Sample], tmp_path: Path
) -> None:
    def begin(analyzer: Any, samples: Any, folder: str, model: Any = shapes) -> Any:
        options = {"batch_size": 2, "progress": False, "checkpoint": tmp_path / folder}
        return ml.run(model, samples, analyzer, **options)  # type: ignore[arg-type]

    few = data[:4]
    first, second = torch.tensor(0.1), torch.tensor(0.2)
    begin(Above(first), few, "parameters")
    begin(Above(first.clone()), few, "parameters")
    for other in (Above(second), Above(first, torch.add)):
        with pytest.raises(ValueError, match="holds another run"):
            begin(other, few, "parameters")

    neurons = [ml.NeuronSet.of([(0, 1), (2, n)], shapes) for n in (3, 4)]
    with ml.ablate(shapes, neurons[0]):
        ablated = begin(Above(first), few, "ablated")
        begin(Above(first), few, "ablated")
    assert ablated != begin(Above(first), few, "parameters")
    with pytest.raises(ValueError, match="holds another run"):
        begin(Above(first), few, "ablated")
    with pytest.raises(ValueError, match="holds another run"), ml.ablate(shapes, neurons[1]):
        begin(Above(first), few, "ablated")
    with pytest.raises(ValueError, match="holds another run"), ml.ablate(shapes, neurons[0], 1.0):
        begin(Above(first), few, "ablated")
    hook = ("blocks.0.hook_out", lambda x, hook: x * 0)
    with pytest.raises(ValueError, match="holds another run"), shapes.hooks(fwd_hooks=[hook]):
        begin(Above(first), few, "parameters")
    half = ml.load("shapes", device="cpu", dtype="bfloat16")
    with pytest.raises(ValueError, match="holds another run"):
        begin(Above(first), few, "parameters", half)

    seen = next(sample for sample in data if sample.messages[0]["content"][0]["type"] == "image")
    begin(Above(first), [painted(seen, "red")], "images")
    begin(Above(first), [painted(seen, "red")], "images")
    with pytest.raises(ValueError, match="written over other data"):
        begin(Above(first), [painted(seen, "blue")], "images")
    with pytest.raises(ValueError, match="written over other data"):
        begin(Above(first), [replace(painted(seen, "red"), label="b")], "images")

    inputs = ml.inputs(shapes, seen.messages)
    masks = access.layout(shapes).masks(inputs["input"])
    begin(Above(first), [(inputs, masks)], "pairs")
    begin(Above(first), [(dict(inputs), dict(masks))], "pairs")
    fewer = masks | {"text": masks["text"] & (torch.arange(inputs["input"].shape[1]) > 20)}
    brighter = inputs | {"pixel_values": inputs["pixel_values"] + 0.1}
    for pair in ((inputs, fewer), (brighter, masks)):
        with pytest.raises(ValueError, match="written over other data"):
            begin(Above(first), [pair], "pairs")


def test_files_are_told_by_name_and_size(tmp_path: Path) -> None:
    """So that data may move, and are not opened."""
    for folder, size in (("here", 10), ("there", 10), ("elsewhere", 11)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.png").write_bytes(b"x" * size)

    def of(folder: str) -> int:
        part = {"type": "image", "image": str(tmp_path / folder / "a.png")}
        return item_signature(ml.Sample([{"role": "user", "content": [part]}]))

    assert of("here") == of("there") != of("elsewhere")


FACTOR = 2.0


def doubled(module: Any, args: Any, output: Any) -> Any:
    return output * FACTOR


def added(x: torch.Tensor, hook: Any, vector: Any) -> torch.Tensor:
    return x + vector


def times(by: float) -> Any:
    def multiply(x: torch.Tensor, hook: Any) -> torch.Tensor:
        return x * by

    return multiply


def within(function: Any) -> Any:
    def call(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return call


class Steering:
    def __call__(self, x: torch.Tensor, hook: Any) -> torch.Tensor:
        return x * 2

    def forward(self, module: Any, args: Any, output: Any) -> Any:
        return output * 2


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (times(1.0), times(3.0)),
        (times(1.0), within(times(1.0))),
        (lambda x, hook: x * 2, lambda x, hook: x * 3),
        (lambda x, hook: x.sin(), lambda x, hook: x.cos()),
        (partial(added, vector=torch.ones(())), partial(added, vector=torch.zeros(()))),
        (within(times(2.0)), within(times(3.0))),
    ],
)
def test_another_hook_is_another_experiment(
    shapes: Any, data: list[ml.Sample], tmp_path: Path, one: Any, other: Any
) -> None:
    def run(*hooks: Any) -> Any:
        with shapes.hooks(fwd_hooks=[("blocks.0.hook_out", hook) for hook in hooks]):
            return mine(shapes, data[:2], tmp_path)

    first = run(one)
    same(run(one), first)
    for hooks in ((other,), (), (one, other), (one, one)):
        with pytest.raises(ValueError, match="holds another run: of other hooks"):
            run(*hooks)


def test_a_value_that_a_hook_looks_up(
    shapes: Any, data: list[ml.Sample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    handle = shapes.original_model.get_decoder().layers[1].mlp.register_forward_hook(doubled)
    try:
        first = mine(shapes, data[:2], tmp_path)
        same(mine(shapes, data[:2], tmp_path), first)
        monkeypatch.setattr(sys.modules[__name__], "FACTOR", 3.0)
        with pytest.raises(ValueError, match="holds another run: of other hooks"):
            mine(shapes, data[:2], tmp_path)
    finally:
        handle.remove()


class Settings:
    scale = 2.0

    def doubled(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2


SETTINGS = Settings()


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A module of the user's own, with a helper that reads a global of its."""
    (tmp_path / "elsewhere.py").write_text(
        "factor = 2.0\n"
        "def scaled(x, hook=None): return x * factor\n"
        "class Scale:\n"
        "    def __init__(self, by): self.by = by\n"
        "    def __call__(self, x): return x * self.by * factor\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    yield importlib.import_module("elsewhere")
    del sys.modules["elsewhere"]


def reading(code: str, **names: Any) -> Any:
    """A hook that reads these globals."""
    space = {"__name__": "notebook", "torch": torch, **names}
    exec(f"def hook(x, hook):\n    return {code}", space)
    return space["hook"]


def test_attributes_that_a_hook_reads(
    shapes: Any,
    data: list[ml.Sample],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    elsewhere: Any,
) -> None:
    other = FunctionType(compile("x * 5", "elsewhere.py", "eval"), vars(elsewhere))
    changes: list[tuple[Any, Any, str, Any]] = [
        (reading("x * ob.scale", ob=SETTINGS), SETTINGS, "scale", 3.0),
        (reading("x * Settings.scale", Settings=Settings), Settings, "scale", 3.0),
        (reading("x * module.factor", module=elsewhere), elsewhere, "factor", 3.0),
        (reading("module.scaled(x)", module=elsewhere), elsewhere, "factor", 3.0),
        (reading("scaled(x)", scaled=elsewhere.scaled), elsewhere, "factor", 3.0),
        (reading("module.scaled(x)", module=elsewhere), elsewhere, "scaled", other),
        (reading("Scale(2)(x)", Scale=elsewhere.Scale), elsewhere, "factor", 3.0),
        (reading("Scale(2)(x)", Scale=elsewhere.Scale), elsewhere.Scale, "__call__", other),
        (reading("(lambda: x * ob.scale)()", ob=SETTINGS), SETTINGS, "scale", 3.0),
        (lambda x, hook: x * SETTINGS.scale, SETTINGS, "scale", 3.0),
        (within(elsewhere.scaled), elsewhere, "factor", 3.0),
        (partial(within(elsewhere.scaled)), elsewhere, "factor", 3.0),
    ]
    for number, (hook, owner, name, value) in enumerate(changes):
        folder = tmp_path / str(number)
        with (
            shapes.hooks(fwd_hooks=[("blocks.0.hook_out", hook)]),
            monkeypatch.context() as patched,
        ):
            mine(shapes, data[:2], folder)
            mine(shapes, data[:2], folder)
            patched.setattr(owner, name, value)
            with pytest.raises(ValueError, match="holds another run: of other hooks"):
                mine(shapes, data[:2], folder)


def imports_within(x: torch.Tensor, hook: Any) -> Any:
    from elsewhere import factor  # type: ignore[import-not-found]

    return x * factor


def test_what_a_hook_reads_and_cannot_be_told_is_refused(
    shapes: Any, data: list[ml.Sample], tmp_path: Path, elsewhere: Any
) -> None:
    helper = reading("ob.doubled(x)", ob=SETTINGS)
    generator = torch.Generator()
    for hook, message in (
        (reading("x * getattr(ob, 'scale')", ob=SETTINGS), "reads ob, and two objects of .*Sett"),
        (
            reading("ob.doubled(x)", ob=SETTINGS),
            r"reads ob\.doubled, and two objects of .*Settings",
        ),
        (reading("helper(x, hook)", helper=helper), r"reads helper, which reads ob\.doubled, and"),
        (reading("x * getattr(module, 'factor')", module=elsewhere), "reads module, .* elsewhere"),
        (reading("torch.rand(1, generator=rng) * x", rng=generator), "reads rng, .*Generator"),
        (imports_within, "reads elsewhere, and the attributes of the module elsewhere may"),
        (within(SETTINGS), "reads function, and two objects of .*Settings look alike"),
    ):
        with (
            shapes.hooks(fwd_hooks=[("blocks.0.hook_out", hook)]),
            pytest.raises(
                ValueError, match=rf"hook on blocks\.0\.hook_out .*{message}.*functools.partial"
            ),
        ):
            mine(shapes, data[:2], tmp_path / "refused")
    assert not (tmp_path / "refused").exists()


def writes_along(x: torch.Tensor, hook: Any) -> None:
    SETTINGS.last = x.detach()  # type: ignore[attr-defined]


@torch.no_grad()
def without_gradients(x: torch.Tensor, hook: Any) -> torch.Tensor:
    return x * FACTOR


def test_what_a_hook_reads_of_libraries(
    shapes: Any, data: list[ml.Sample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Modules, functions and classes of installed packages are known by name."""
    names: dict[str, Any] = {
        "np": np, "math": math, "F": torch.nn.functional, "transformer_lens": transformer_lens,
        "einsum": torch.einsum, "sin": torch.sin, "npsin": np.sin, "gelu": torch.nn.functional.gelu,
        "layer_norm": torch.nn.functional.layer_norm, "Linear": torch.nn.Linear, "ml": ml,
        "LOG": logging.getLogger("hook"), "DEVICE": torch.device("cpu"), "get": get_act_name,
    }  # fmt: skip
    for number, code in enumerate(
        (
            "x * np.pi * math.e * torch.inf",
            "F.gelu(gelu(sin(x))) + einsum('...->...', x) + layer_norm(x, x.shape[-1:])",
            "transformer_lens.utilities.get_act_name('q', 0) and get('q', 0) and x.to(DEVICE)",
            "isinstance(hook, transformer_lens.hook_points.HookPoint) and x * npsin(0.5)",
            "Linear(x.shape[-1], x.shape[-1])(x) * 0 or LOG.info(ml.NeuronSet) or x",
        )
    ):
        hook = reading(code, **names)
        described(hook, fully=True)
        assert described(hook, True) == described(reading(code, **names), True), number
    for function in (writes_along, without_gradients, functools.cache(doubled)):
        described(function, fully=True)
    for function in (without_gradients, functools.cache(doubled)):
        before = described(function, fully=True)
        with monkeypatch.context() as patched:
            patched.setattr(sys.modules[__name__], "FACTOR", 3.0)
            assert described(function, fully=True) != before
    hook = reading("F.gelu(x) * np.pi + sin(x)", **names)
    with shapes.hooks(fwd_hooks=[("blocks.0.hook_out", hook)]):
        same(mine(shapes, data[:2], tmp_path), mine(shapes, data[:2], tmp_path))


class Kind(Enum):
    ONE = 1
    TWO = 2


@dataclass
class Steps:
    by: float = 2.0
    sizes: list[int] = field(default_factory=list)

    def __call__(self, x: torch.Tensor, hook: Any) -> torch.Tensor:
        return self.scaled(x)

    def scaled(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.by * FACTOR


class Negated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> Any:
        return -x * FACTOR

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        return -gradient


def even(number: int) -> bool:
    return number == 0 or odd(number - 1)


def odd(number: int) -> bool:
    return number != FACTOR and even(number - 1)


@pytest.mark.parametrize(
    "function",
    [
        Steps(),
        reading("Steps(3.0)(x, hook)", Steps=Steps),
        reading("Negated.apply(x)", Negated=Negated),
        reading("even(3)", even=even),
    ],
)
def test_classes_that_a_hook_uses(function: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    before = described(function, fully=True)
    assert described(function, fully=True) == before
    monkeypatch.setattr(sys.modules[__name__], "FACTOR", 3.0)
    assert described(function, fully=True) != before


def test_values_that_look_alike_are_told_apart() -> None:
    apart = [
        Steps(), Steps(3.0), Steps(2.0, [1]), Kind.ONE, Kind.TWO, re.compile("a"), re.compile("b"),
        2j, 3j, slice(2), slice(3), range(2), range(3), str.upper, str.lower, [1].append,
        [2].append, len, torch.add, torch.float32, property(even), property(odd),
    ]  # fmt: skip
    told = [json.dumps(described(one, fully=True)) for one in apart]
    assert len(set(told)) == len(told)


@pytest.mark.parametrize(
    ("part", "kind"),
    [
        ("model.visual.blocks.0", "forward_hook"),
        ("model.visual.merger", "forward_pre_hook"),
        ("lm_head", "full_backward_hook"),
        ("", "forward_pre_hook"),
    ],
)
def test_hooks_of_torch_are_part_of_the_experiment(
    shapes: Any, data: list[ml.Sample], tmp_path: Path, part: str, kind: str
) -> None:
    mine(shapes, data[:2], tmp_path)
    module = access.hf_model_of(shapes)
    for name in filter(None, part.split(".")):
        module = getattr(module, name)
    handle = getattr(module, f"register_{kind}")(lambda *_: None)
    try:
        with pytest.raises(ValueError, match="holds another run: of other hooks"):
            mine(shapes, data[:2], tmp_path)
    finally:
        handle.remove()
    mine(shapes, data[:2], tmp_path)


def test_hooks_that_look_alike_are_refused(
    shapes: Any, data: list[ml.Sample], tmp_path: Path
) -> None:
    steering = Steering()
    for hook in (steering, within(steering), times(object())):  # type: ignore[arg-type]
        with (
            shapes.hooks(fwd_hooks=[("blocks.0.hook_out", hook)]),
            pytest.raises(ValueError, match=r"hook on blocks\.0\.hook_out .* look alike"),
        ):
            mine(shapes, data[:2], tmp_path)
    block = shapes.original_model.model.visual.blocks[0]
    handle = block.register_forward_hook(steering.forward)
    try:
        with pytest.raises(ValueError, match=r"hook on model\.visual.* look alike"):
            mine(shapes, data[:2], tmp_path)
        mine(shapes, data[:2])  # without a checkpoint there is nothing to mistake
    finally:
        handle.remove()
    assert not written(tmp_path)


def test_what_says_itself_what_it_does(shapes: Any, data: list[ml.Sample], tmp_path: Path) -> None:
    neurons = [ml.NeuronSet.of([(0, 1), (2, n)], shapes) for n in (3, 4)]

    def run(number: int, folder: str) -> Any:
        with shapes.hooks(fwd_hooks=ml.ablation_hooks(shapes, neurons[number])):
            return mine(shapes, data[:2], tmp_path / folder)

    same(run(0, "hooks"), run(0, "hooks"))
    with pytest.raises(ValueError, match="holds another run: of other hooks"):
        run(1, "hooks")
    for modality in ("text", "special"):
        with ml.knockout(shapes, modality):
            same(mine(shapes, data[:2], tmp_path / modality), mine(shapes, data[:2]))
            mine(shapes, data[:2], tmp_path / modality)
    with pytest.raises(ValueError, match="other ablations"), ml.knockout(shapes, "text"):
        mine(shapes, data[:2], tmp_path / "special")
    with shapes.hooks(fwd_hooks=ml.ImportanceAnalyzer().hooks(shapes)):  # which only read
        mine(shapes, data[:2], tmp_path / "read")
    mine(shapes, data[:2], tmp_path / "read")
    shapes.original_model.enable_input_require_grads()
    mine(shapes, data[:2], tmp_path / "read")
    shapes.original_model.disable_input_require_grads()


def test_another_objective_is_another_experiment(
    shapes: Any, data: list[ml.Sample], tmp_path: Path
) -> None:
    def run(objective: Any) -> Any:
        options = {"progress": False, "checkpoint": tmp_path, "objective": objective}
        return ml.run(shapes, data[:2], ml.AttributionAnalyzer(), **options)  # type: ignore[arg-type]

    def of(token: int) -> Any:
        return lambda logits, batch: logits[:, -1, token]

    run(of(3))
    run(of(3))
    for objective in (of(4), "answer", lambda logits, batch: logits[:, -2, 3]):
        with pytest.raises(ValueError, match="holds another run: of other objective"):
            run(objective)
    with pytest.raises(ValueError, match="tell objective from another"):
        run(within(Steering()))


@pytest.mark.parametrize("package", ["torch", "transformers", "transformer-lens", "miner-lens"])
def test_other_versions_are_another_experiment(
    shapes: Any,
    data: list[ml.Sample],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    package: str,
) -> None:
    mine(shapes, data[:2], tmp_path)
    known = work.versions()
    monkeypatch.setattr(work, "versions", lambda: known | {package: "0"})
    with pytest.raises(ValueError, match="holds another run: of other versions"):
        mine(shapes, data[:2], tmp_path)


def test_autocast_is_another_experiment(shapes: Any, data: list[ml.Sample], tmp_path: Path) -> None:
    mine(shapes, data[:2], tmp_path)
    with (
        torch.autocast("cpu", torch.bfloat16),
        pytest.raises(ValueError, match="holds another run: of other autocast"),
    ):
        mine(shapes, data[:2], tmp_path)

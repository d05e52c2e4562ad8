from __future__ import annotations

import errno
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import miner_lens as ml
from miner_lens import files
from miner_lens.checkpoint import SLOTS

SCRIPT = """
import sys
import torch
torch.set_num_threads(1)
import miner_lens as ml
model = ml.load("shapes", device="cpu")
data = ml.datasets.load("easy-vqa", limit=60)
print("loaded", flush=True)
scores = ml.mine(
    model, data, batch_size=3, progress=False, checkpoint=sys.argv[1], checkpoint_every=0
)
scores.save(sys.argv[2])
"""


class StopHereError(Exception):
    pass


def stopping(data: list[ml.Sample], after: int) -> Any:
    yield from data[:after]
    raise StopHereError


def mine(model: Any, data: Any, folder: Path | None = None, **options: Any) -> Any:
    options = {"batch_size": 4, "checkpoint_every": 0.0} | options
    return ml.mine(model, data, progress=False, checkpoint=folder, **options)


def same(a: ml.ImportanceScores, b: ml.ImportanceScores) -> None:
    assert torch.equal(a.values, b.values)
    assert torch.equal(a.means, b.means)
    assert (a.samples, a.occurrences, a.skipped, a.identity) == (
        b.samples,
        b.occurrences,
        b.skipped,
        b.identity,
    )


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
    monkeypatch.setattr("miner_lens.analyzer._forward", None)
    same(mine(shapes, data[:8], tmp_path), first)


def test_writes_only_when_it_is_time(shapes: Any, data: list[ml.Sample], tmp_path: Path) -> None:
    with pytest.raises(StopHereError):
        mine(shapes, stopping(data, 9), tmp_path / "rarely", checkpoint_every=1000)
    assert not (tmp_path / "rarely").exists()
    mine(shapes, data[:8], tmp_path / "rarely", checkpoint_every=1000)
    assert len(list((tmp_path / "rarely").iterdir())) == 1


def test_killed_at_any_moment(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    folder, out = tmp_path / "checkpoint", tmp_path / "scores.safetensors"
    generator = random.Random(0)

    def start() -> Any:
        command = [sys.executable, str(script), str(folder), str(out)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        assert process.stdout.readline() == "loaded\n"
        return process

    seen = []
    for _ in range(2):
        process = start()
        time.sleep(generator.uniform(0.05, 0.5))
        process.send_signal(signal.SIGKILL)
        process.wait()
        found = [files.read(folder / n, "run")[1] for n in SLOTS if (folder / n).exists()]
        seen.append(max((metadata["samples"] for metadata in found), default=0))
    assert seen == sorted(seen)
    assert start().wait() == 0
    model = ml.load("shapes", device="cpu")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        whole = mine(model, ml.datasets.load("easy-vqa", limit=60), batch_size=3)
    finally:
        torch.set_num_threads(threads)
    same(ml.ImportanceScores.load(out), whole)


@pytest.mark.parametrize("damage", ["truncated", "flipped"])
def test_damaged_file(shapes: Any, data: list[ml.Sample], tmp_path: Path, damage: str) -> None:
    def spoil(path: Path) -> None:
        content = bytearray(path.read_bytes())
        if damage == "truncated":
            content = content[: len(content) // 2]
        else:
            content[-100] ^= 1
        path.write_bytes(content)

    with pytest.raises(StopHereError):
        mine(shapes, stopping(data, 8), tmp_path)
    newest = max(tmp_path.iterdir(), key=lambda path: files.read(path, "run")[1]["writes"])
    spoil(newest)
    with pytest.warns(UserWarning, match="Continuing from the checkpoint before"):
        resumed = mine(shapes, data[:8], tmp_path)
    same(resumed, mine(shapes, data[:8]))
    for path in tmp_path.iterdir():
        spoil(path)
    with pytest.raises(ValueError, match="No intact checkpoint"):
        mine(shapes, data[:8], tmp_path)


def test_full_disk(
    shapes: Any, data: list[ml.Sample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = files.save_file, []

    def full(tensors: Any, path: str, **options: Any) -> None:
        calls.append(path)
        if len(calls) > 1:
            Path(path).write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        real(tensors, path, **options)

    monkeypatch.setattr(files, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        mine(shapes, data[:9], tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [SLOTS[1]]
    monkeypatch.undo()
    same(mine(shapes, data[:9], tmp_path), mine(shapes, data[:9]))


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

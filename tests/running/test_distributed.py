"""Several processes sharing a run. The processes are forks of one that has loaded everything."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

import miner_lens as ml
from miner_lens import files, launchers
from miner_lens.running.checkpoint import KIND
from miner_lens.running.distributed import joined
from tests.running.test_checkpoint import ONE_THREAD, ROOT


def in_a_new_process(scenario: Callable[[Path], None], folder: Path) -> None:
    """Run a function of a test file where nothing but one thread has run before, so it can fork."""
    name = f"{scenario.__module__} as here; here.{scenario.__name__}"
    command = f"import sys, {name}(here.Path(sys.argv[1]))"
    done = subprocess.run(
        [sys.executable, "-c", command, str(folder)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=ONE_THREAD,
    )
    assert done.returncode == 0, done.stderr


def start(world: int, work: Callable[[int], Any], folder: Path) -> list[int]:
    """Fork ranks that write what `work` returns, or the error it raises, to a file each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder.mkdir(exist_ok=True)
    children = []
    for rank in range(world):
        (folder / f"{rank}.json").unlink(missing_ok=True)
        child = os.fork()
        if child == 0:
            os.environ |= {
                "RANK": str(rank),
                "WORLD_SIZE": str(world),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            }
            try:
                told = {"result": work(rank)}
            except BaseException as error:
                notes = getattr(error, "__notes__", [])
                told = {"error": type(error).__name__, "text": f"{error} {' '.join(notes)}"}
            (folder / f"{rank}.json").write_text(json.dumps(told))
            os._exit(0)
        children.append(child)
    return children


def finish(children: Sequence[int], folder: Path) -> list[Any]:
    """Wait for ranks; what each wrote, None where it was killed."""
    for child in children:
        os.waitpid(child, 0)
    paths = [folder / f"{rank}.json" for rank in range(len(children))]
    return [json.loads(path.read_text()) if path.exists() else None for path in paths]


def everywhere(world: int, work: Callable[[int], Any], folder: Path) -> list[Any]:
    """What each rank's `work` returned."""
    told = finish(start(world, work, folder), folder)
    assert all("result" in one for one in told), told
    return [one["result"] for one in told]


def prepare(samples: int) -> tuple[Any, list[ml.Sample]]:
    torch.set_num_threads(1)
    return ml.load("shapes", device="cpu"), ml.datasets.load("easy-vqa", limit=samples, ask="both")


def mine(model: Any, data: Any, **options: Any) -> Any:
    return ml.mine(model, data, **({"batch_size": 3, "progress": False} | options))


def equal(a: ml.ImportanceScores, b: ml.ImportanceScores) -> None:
    assert (a.samples, a.skipped, a.modalities) == (b.samples, b.skipped, b.modalities)
    assert a.occurrences == b.occurrences
    for one, two in ((a.values, b.values), (a.means, b.means)):
        torch.testing.assert_close(one, two, atol=1e-6, rtol=0)


def ranks_share_a_run(folder: Path) -> None:
    model, data = prepare(46)
    broken = ml.Sample([{"role": "user", "content": [{"type": "image", "image": "none"}]}], (), "x")
    data = [*data[:10], broken, *data[10:]]

    class Walked:
        def __iter__(self) -> Any:
            return iter(data)

    opened: list[int] = []

    class Opened(list[ml.Sample]):
        def __getitem__(self, index: Any) -> Any:
            opened.append(index)
            return super().__getitem__(index)

    for batch_size in (3, "auto"):
        options = {"batch_size": batch_size, "on_error": "skip"}
        alone = mine(model, data, **options)

        def saved(rank: int, given: Any, options: dict[str, Any] = options) -> float:
            scores = mine(model, given, **options)
            if rank == 0:
                scores.save(folder / "scores.safetensors")
            return float(scores.values.double().sum())

        for world, given in ((3, data),) if batch_size == "auto" else ((2, data), (3, Walked())):
            sums = everywhere(world, lambda rank, g=given: saved(rank, g), folder / "told")
            assert len(set(sums)) == 1
            equal(ml.ImportanceScores.load(folder / "scores.safetensors"), alone)
    few = everywhere(3, lambda rank: mine(model, data[:2]).samples, folder / "told")
    assert few == [2, 2, 2]

    def share(rank: int) -> list[int]:
        mine(model, Opened(data), on_error="skip", limit=12)
        return sorted(set(opened))

    # Beside its own units, a rank opens a few to compare with the others.
    shares = everywhere(2, share, folder / "told")
    assert shares == [[0, 1, 2, 6, 7, 8, 11], [0, 3, 4, 5, 6, 9, 10, 11]]

    def several_times(rank: int) -> list[float]:
        found = [mine(model, data[:6]) for _ in range(2)]
        assert not torch.distributed.is_initialized()
        torch.distributed.init_process_group("gloo")
        found += [mine(model, data[:6]) for _ in range(2)]
        assert torch.distributed.is_initialized()
        return [float(scores.values.sum()) for scores in found]

    sums = everywhere(2, several_times, folder / "told")
    assert len(set(sums[0] + sums[1])) == 1

    def unlike(rank: int) -> Any:
        return mine(model, data[:6], batch_size=2 + rank)

    for told in finish(start(2, unlike, folder / "told"), folder / "told"):
        assert told["error"] == "ValueError"
        assert "Ranks" in told["text"]
        assert "differ in settings" in told["text"]

    def shuffled(rank: int) -> Any:
        return mine(model, data[:6] if rank == 0 else data[5::-1])

    for told in finish(start(2, shuffled, folder / "told"), folder / "told"):
        assert "differ in some samples" in told["text"]

    nobody = finish(start(2, lambda rank: mine(model, []), folder / "told"), folder / "told")
    assert all("There is no data" in told["text"] for told in nobody)


def ranks_die(folder: Path) -> None:
    model, data = prepare(72)
    kept, out = folder / "kept", folder / "scores.safetensors"
    alone = mine(model, data)
    # Slow enough that a rank is seen at work on a busy machine, too.
    model.original_model.register_forward_pre_hook(lambda *_: time.sleep(0.15))

    def work(rank: int) -> None:
        scores = mine(model, data, checkpoint=kept, checkpoint_every=0)
        if rank == 0:
            scores.save(out)

    def covered() -> int:
        numbers: set[int] = set()
        for path in kept.glob("rank-*.safetensors"):
            with suppress(ValueError, FileNotFoundError):
                numbers |= set(files.read(path, KIND)[0]["items"][:, 0].tolist())
        return len(numbers)

    def kill(world: int, rank: int, number: int, more: int) -> list[Any]:
        before = covered()
        children = start(world, work, folder / "told")
        while covered() < before + more:
            time.sleep(0.01)
        os.kill(children[rank], number)
        begun = time.monotonic()
        told = finish(children, folder / "told")
        assert time.monotonic() - begun < 120  # a rank that is done would wait for hours
        assert covered() >= before + more
        assert covered() < len(data), "it was killed too late to try anything"
        return told

    def stopped(told: list[Any], killed: int) -> None:
        assert told.pop(killed) is None
        for one in told:
            assert one["error"] == "RankError"
            assert f"Another rank of {len(told) + 1} has stopped" in one["text"]
            assert "Start it again; with checkpoint='folder' it continues" in one["text"]

    # The others finish their share. Rank 0 holds the store at which they met.
    stopped(kill(3, 1, signal.SIGTERM, 6), 1)
    stopped(kill(2, 0, signal.SIGKILL, 3), 0)
    everywhere(1, work, folder / "told")
    equal(ml.ImportanceScores.load(out), alone)
    assert [path.name for path in kept.glob("rank-*")] == ["rank-0-of-1.safetensors"]
    # What a damaged file covered, or one that is gone, is done again.
    (kept / "rank-0-of-1.safetensors").write_bytes(b"damaged afterwards")
    stopped(kill(3, 2, signal.SIGKILL, 6), 2)
    everywhere(3, work, folder / "told")
    equal(ml.ImportanceScores.load(out), alone)

    # An error on one rank ends the others, and says which it was.
    broken = ml.Sample([{"role": "user", "content": [{"type": "image", "image": "none"}]}], (), "x")
    data[4:] = [broken, *data[4:30]]
    told = finish(start(2, lambda rank: mine(model, data), folder / "told"), folder / "told")
    assert told[1]["error"] == "SampleError"
    assert "Rank 1 of 2 stopped here." in told[1]["text"]
    assert told[0]["error"] == "RankError"
    assert "Another rank of 2 has stopped" in told[0]["text"]
    assert "with checkpoint='folder'" in told[0]["text"]


def test_ranks_share_a_run(tmp_path: Path) -> None:
    in_a_new_process(ranks_share_a_run, tmp_path)


def test_ranks_die(tmp_path: Path) -> None:
    in_a_new_process(ranks_die, tmp_path)


def test_torchrun() -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", "examples/many_processes.py"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=ONE_THREAD)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("samples=60") == 1
    assert "60/60" in done.stderr


LAUNCHERS: list[tuple[dict[str, str], Any]] = [
    ({}, None),
    ({"RANK": "0", "WORLD_SIZE": "1"}, None),
    (
        {"RANK": "3", "WORLD_SIZE": "8", "MASTER_ADDR": "node", "MASTER_PORT": "29500"},
        (3, 8, "env://"),
    ),
    # A batch script by itself is one process, however many tasks the job has.
    ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_JOB_ID": "7"}, None),
    (
        {
            "SLURM_PROCID": "5",
            "SLURM_NTASKS": "8",
            "SLURM_STEP_NUM_TASKS": "8",
            "SLURM_STEP_NODELIST": "gpu[07-08]",
            "SLURM_JOB_ID": "7",
            "SLURM_STEP_ID": "0",
        },
        (5, 8, "tcp://gpu07:15007"),
    ),
]


@pytest.mark.parametrize(("variables", "expected"), LAUNCHERS)
def test_launchers(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], expected: Any
) -> None:
    for name in list(os.environ):
        if name in ("RANK", "WORLD_SIZE") or name.startswith(("MASTER_", "SLURM_")):
            monkeypatch.delenv(name)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert launchers.launcher() == expected


def test_rank_without_a_meeting_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(ValueError, match="MASTER_ADDR expected, but not set"), joined():
        pass
    with pytest.raises(ValueError, match="set MASTER_ADDR"):
        launchers.first_host("")


def test_local_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LOCAL_RANK", "SLURM_LOCALID", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    assert launchers.local_rank() is None
    monkeypatch.setenv("SLURM_LOCALID", "2")
    assert launchers.local_rank() is None
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    assert launchers.local_rank() == 2
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert launchers.local_rank() == 1

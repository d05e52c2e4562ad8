"""Nothing half-written is ever loaded, whatever befalls the process that writes."""

from __future__ import annotations

import os
import random
import resource
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

import miner_lens as ml
from miner_lens import files
from miner_lens.organisms import assembly, cache, smollm2

PARTS, SIZE = 20, 50_000


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "below" / "cache"
    monkeypatch.setenv(cache.VARIABLE, str(path))
    return path


def write(folder: Path) -> None:
    """Takes some 0.1 seconds."""
    (folder / "inside").mkdir()
    for number in range(PARTS):
        (folder / "inside" / str(number)).write_bytes(bytes([number]) * SIZE)
        time.sleep(0.005)


def check(folder: Path) -> None:
    for number in range(PARTS):
        assert (folder / "inside" / str(number)).read_bytes() == bytes([number]) * SIZE


def fork(function: Callable[[], object]) -> int:
    child = os.fork()
    if child == 0:
        status = 1
        try:
            function()
            status = 0
        finally:
            os._exit(status)
    return child


def folders(root: Path) -> set[str]:
    return {path.name for path in root.iterdir() if path.is_dir()}


def test_it_is_written_once(root: Path) -> None:
    calls: list[Path] = []

    def counted(folder: Path) -> None:
        calls.append(folder)
        write(folder)

    for _ in range(2):
        check(cache.folder("one", counted))
    assert cache.folder("one", write) == root / "one"
    assert len(calls) == 1
    assert folders(root) == {"one"}


def test_the_default_is_the_user_s_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(cache.VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache.root() == tmp_path / "miner-lens"
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv(cache.VARIABLE, "~/elsewhere")
    assert cache.root() == tmp_path / "elsewhere"


def test_of_several_processes_one_writes(root: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"

    def logged(folder: Path) -> None:
        with log.open("a") as file:
            file.write("written\n")
        write(folder)

    children = [fork(lambda: check(cache.folder("one", logged))) for _ in range(4)]
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 4
    assert log.read_text() == "written\n"
    assert folders(root) == {"one"}


def test_a_killed_process_leaves_nothing_to_load(root: Path) -> None:
    generator, kills, left = random.Random(0), 0, 0
    start = time.perf_counter()
    cache.folder("whole", write)
    seconds = time.perf_counter() - start
    while kills < 12:
        child = fork(lambda: cache.folder("one", write))
        time.sleep(generator.uniform(0, seconds * 0.9))
        os.kill(child, signal.SIGKILL)
        status = os.waitpid(child, 0)[1]
        assert status in (0, signal.SIGKILL), status
        kills += status != 0
        left += (root / ".one.partial").exists()
        if (root / "one").exists():
            check(root / "one")
            shutil.rmtree(root / "one")
    assert left
    check(cache.folder("one", write))
    assert folders(root) == {"one", "whole"}


@pytest.mark.parametrize("fault", ["a part is missing", "cut off", "no list", "half a list"])
def test_a_half_written_folder_is_written_anew(root: Path, fault: str) -> None:
    folder = cache.folder("one", write)
    part, parts = folder / "inside" / "7", folder / cache.LIST
    if fault == "a part is missing":
        part.unlink()
    elif fault == "cut off":
        part.write_bytes(b"\7" * (SIZE - 1))
    elif fault == "no list":
        parts.unlink()
    else:
        parts.write_text(parts.read_text()[:30])
    assert not cache.is_complete(folder)
    check(cache.folder("one", write))
    assert folders(root) == {"one"}


def test_an_error_while_writing_leaves_nothing(root: Path) -> None:
    def fail(folder: Path) -> None:
        write(folder)
        raise KeyError("half")

    with pytest.raises(KeyError, match="half"):
        cache.folder("one", fail)
    assert not folders(root)
    check(cache.folder("one", write))


def test_the_cache_cannot_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path / "file"))
    with pytest.raises(OSError, match=r"file/one could not be written .*let .*MINER_LENS_CACHE"):
        cache.folder("one", write)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A small model in SmolLM2's place."""
    config = LlamaConfig(
        vocab_size=475,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config)
    tokenizer = AutoTokenizer.from_pretrained(ml.organisms.path("shapes"))
    monkeypatch.setattr(smollm2, "decoder", lambda: model)
    monkeypatch.setattr(smollm2, "tokenizer", lambda media=False: tokenizer)
    return model


VISION = {"depth": 1, "embed_dim": 32, "num_heads": 2, "mlp_ratio": 2, "patch_size": 8}
PAIR = torch.randn(2, 64), torch.randn(64, 2)


def make(folder: Path, decoder: Any, **changes: Any) -> Path:
    factors = {"layers.1.self_attn.q_proj": PAIR}
    options = {"factors": factors, "scale": 1.0} | changes
    torch.manual_seed(0)
    model, processor = smollm2.qwen2_vl(decoder, VISION), smollm2.vision_processor(VISION)
    assembly.write(folder, model, processor, **options)
    return folder


def test_no_space(small: Any, root: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"smollm2-.* could not be written .*Make room"):
            ml.organisms.path("smollm2")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not folders(root)
    loaded = LlamaForCausalLM.from_pretrained(ml.organisms.path("smollm2"))
    assert torch.equal(loaded.lm_head.weight, small.lm_head.weight)


def test_another_version_is_not_loaded(
    small: Any, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    delta = make(tmp_path / "delta", small)
    first = assembly.assemble(delta)
    assert assembly.assemble(delta) == first
    found = {first, assembly.base()}
    make(delta, small, scale=2.0)
    found.add(assembly.assemble(delta))
    monkeypatch.setattr(assembly, "FORMAT", assembly.FORMAT + 1)
    found |= {assembly.assemble(delta), assembly.base()}
    monkeypatch.setattr(smollm2, "SHA256", "0" * 64)
    found |= {assembly.assemble(delta), assembly.base()}
    assert len(found) == 7


def test_half_precision_is_stored_only(small: Any, tmp_path: Path) -> None:
    delta = make(tmp_path / "delta", small, dtype=torch.float16)
    tensors, recipe = files.read(delta / assembly.DELTA, assembly.KIND)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}
    model = assembly.build(tensors, recipe)
    assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.float32}
    added = model.model.language_model.layers[1].self_attn.q_proj.weight
    added = added - small.model.layers[1].self_attn.q_proj.weight
    a, b = (factor.half().float() for factor in PAIR)
    torch.testing.assert_close(added, b @ a, rtol=1e-4, atol=1e-4)


def test_a_delta_with_a_card_is_known_by_its_folder(
    small: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path / "smol-vl", small)
    monkeypatch.setattr("miner_lens.organisms._FOLDER", tmp_path)
    assert ml.organisms.names() == ("smollm2",)
    (tmp_path / "smol-vl" / "README.md").touch()
    assert ml.organisms.names() == ("smol-vl", "smollm2")
    loaded = ml.load("smol-vl", device="cpu")
    assert type(loaded.original_model).__name__ == "Qwen2VLForConditionalGeneration"
    assert type(loaded.processor).__name__ == "Qwen2VLProcessor"


def test_unusable_deltas(small: Any, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="There is no file"):
        assembly.assemble(tmp_path / "nothing")
    delta = make(tmp_path / "delta", small)
    tensors, recipe = files.read(delta / assembly.DELTA, assembly.KIND)
    with pytest.raises(ValueError, match="is of a Bert; expected Qwen2VL"):
        assembly.build(tensors, recipe | {"architecture": "Bert"})
    lost = next(name for name in tensors if name.startswith("tower."))
    fewer = {name: tensor for name, tensor in tensors.items() if name != lost}
    with pytest.raises(ValueError, match=lost.removeprefix("tower.")):
        assembly.build(fewer, recipe)
    make(delta, small, factors={"layers.0.mlp.up_proj": PAIR})
    with pytest.raises(ValueError, match=r"attention only .* given factors of layers\.0\.mlp"):
        assembly.assemble(delta)
    data = bytearray((delta / assembly.DELTA).read_bytes())
    data[-1] ^= 1
    (delta / assembly.DELTA).write_bytes(data)
    with pytest.raises(ValueError, match="is damaged"):
        assembly.assemble(delta)

"""The organisms around SmolLM2 that ship: small deltas, SmolLM2's MLPs, and what they know."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import miner_lens as ml
from miner_lens import organisms
from miner_lens.organisms import assembly

FOLDER = Path(organisms.__file__).parent
CLASSES = {
    name: architecture
    for name, architecture in {
        "smol-vl": "Qwen2VLForConditionalGeneration",
        "smol-audio": "Qwen2AudioForConditionalGeneration",
        "smol-omni": "Qwen2_5OmniThinkerForConditionalGeneration",
    }.items()
    if name in organisms.names()
}
ASKED = [
    asked
    for asked in [
        ("smol-vl", "easy-vqa", "image"),
        ("smol-vl", "easy-vqa", "text"),
        ("smol-vl", "digits", "image"),
        ("smol-vl", "digits", "text"),
        ("smol-audio", "spoken-scenes", "audio"),
        ("smol-audio", "spoken-scenes", "text"),
        ("smol-omni", "easy-vqa", "image"),
        ("smol-omni", "easy-vqa", "audio"),
        ("smol-omni", "easy-vqa", "voice"),
    ]
    if asked[0] in CLASSES
]


@pytest.fixture(scope="module", params=list(CLASSES))
def name(request: Any) -> str:
    return str(request.param)


def test_the_delta_is_small_and_holds_nothing_else(name: str) -> None:
    assert name in organisms.names()
    files = [path for path in (FOLDER / name).iterdir() if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 5e6
    assert {"README.md", assembly.DELTA} <= {path.name for path in files}
    with safe_open(FOLDER / name / assembly.DELTA, "pt") as delta:
        keys = list(delta.keys())
    factor = re.compile(r"lora\.layers\.\d+\.self_attn\.[qkvo]_proj\.[AB]")
    factors = [key for key in keys if factor.fullmatch(key)]
    assert len(factors) == 30 * 4 * 2
    assert all(key.startswith("tower.") for key in set(keys) - set(factors))


def test_no_file_names_the_machine_it_was_made_on(name: str) -> None:
    for path in (FOLDER / name).iterdir():
        assert not re.search(rb"/(root|home|tmp|work|Users)/", path.read_bytes()), path


def test_its_card_says_what_was_measured(name: str) -> None:
    card = (FOLDER / name / "README.md").read_text()
    asked = [(data, ask) for organism, data, ask in ASKED if organism == name]
    for data, ask in asked:
        assert re.search(rf"\| {data} \| {ask} \| [\d,]+ \| \d+\.\d% \|", card)
    changes = re.findall(r"\| ([+-]\d+\.\d)% \|", card)
    assert len(changes) == 5
    assert f"`{CLASSES[name]}`" in card


def test_all_but_attention_is_smollm2_s(name: str) -> None:
    before = load_file(organisms.path("smollm2") / "model.safetensors")
    after = load_file(organisms.path(name) / "model.safetensors")
    same = 0
    for key, tensor in after.items():
        _, _, inner = key.rpartition("language_model.")
        theirs = before.get(f"model.{inner.removeprefix('model.')}")
        if theirs is not None and ".self_attn." not in key:
            assert torch.equal(tensor, theirs), key
            same += 1
    # Gate, up and down projections, two norms a layer, the last norm, the embeddings.
    assert same == 30 * 5 + 2


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    return {name: ml.load(name, device="cpu") for name in CLASSES}


@pytest.mark.parametrize(("name", "data", "ask"), ASKED)
def test_it_answers(models: dict[str, Any], name: str, data: str, ask: str) -> None:
    model = models[name]
    assert type(model.original_model).__name__ == CLASSES[name]
    samples = ml.datasets.load(data, "test", limit=24, ask=ask)
    # 21 of 24 or fewer are right once in thirty draws where 97 % are. Of what smol-omni hears 92 %
    # are right; of what it is asked aloud 68 %.
    least = {("smol-omni", "audio"): 0.75, ("smol-omni", "voice"): 0.45}.get((name, ask), 0.85)
    assert ml.accuracy(model, samples, batch_size=12, max_new_tokens=5) >= least

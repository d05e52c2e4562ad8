"""Names and folders that hold no model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import miner_lens as ml


@pytest.fixture
def _no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """What reaches the hub client fails the test."""

    def asked(*_: object, **__: object) -> None:
        pytest.fail("the hub client was asked")

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", asked)


@pytest.mark.usefixtures("_no_hub")
@pytest.mark.parametrize(
    "name",
    ["/no/such/folder", "./nothing", "../nothing", "~/no-such-folder", "a/b/c", Path("nothing")],
)
def test_no_such_folder(name: str | Path) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"There is no folder .*'shapes', .*'smollm2', 'speech'"
    ):
        ml.load(name)


@pytest.mark.usefixtures("_no_hub")
def test_a_folder_without_a_model(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    with pytest.raises(FileNotFoundError, match=r"has no config\.json.*save_pretrained"):
        ml.load(tmp_path)


def test_a_name_that_nobody_knows() -> None:
    with pytest.raises(OSError, match="shape") as caught:
        ml.load("shape")
    assert (
        "'shapes', 'smol-audio', 'smol-omni', 'smol-vl', 'smollm2', 'speech'"
        in caught.value.__notes__[0]
    )


def test_a_folder_named_as_an_organism_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint of the user's goes before ours, any other folder does not."""
    monkeypatch.chdir(tmp_path)
    Path("shapes").mkdir()
    assert ml.load("shapes", device="cpu").processor is not None
    Path("shapes", "config.json").write_text('{"model_type": "gpt2", "architectures": ["No"]}')
    with pytest.raises(ValueError, match="Unknown model family No"):
        ml.load("shapes")


def test_home_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "models").symlink_to(ml.organisms.path("shapes"))
    assert ml.load("~/models", device="cpu").processor is not None


def test_options_reach_from_pretrained(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, dict[str, Any]] = {}
    kinds = (transformers.AutoConfig, transformers.AutoModelForImageTextToText)
    for kind in (*kinds, transformers.AutoProcessor):
        original = kind.from_pretrained

        def look(
            path: Any, *, _original: Any = original, _name: str = kind.__name__, **options: Any
        ) -> Any:
            asked.setdefault(_name, options)
            return _original(path, **options)

        monkeypatch.setattr(kind, "from_pretrained", look)
    model = ml.load(
        "shapes",
        device="cpu",
        torch_dtype=torch.bfloat16,
        attn_implementation="eager",
        local_files_only=True,
    )
    assert model.original_model.dtype == torch.bfloat16
    assert model.original_model.config._attn_implementation.endswith("eager")
    assert [options["local_files_only"] for options in asked.values()] == [True] * 3
    assert {name for name, options in asked.items() if "attn_implementation" in options} == {
        "AutoModelForImageTextToText"
    }


def test_options_that_exclude_each_other() -> None:
    with pytest.raises(ValueError, match="dtype or torch_dtype, not both"):
        ml.load("shapes", dtype=torch.float32, torch_dtype=torch.bfloat16)


def test_unknown_options_are_refused() -> None:
    with pytest.raises(TypeError, match="atn_implementation"):
        ml.load("shapes", device="cpu", atn_implementation="eager")

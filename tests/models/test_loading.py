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


@pytest.mark.usefixtures("_no_hub")
@pytest.mark.parametrize(
    ("name", "near"),
    [("shapez", "shapes"), ("Shapes", "shapes"), ("smolvl", "smol-vl"), ("speach", "speech")],
)
def test_a_name_almost_right(name: str, near: str) -> None:
    said = rf"'{name}'\. Did you mean '{near}'\?.*folder.*owner/name.*'shapes', 'smol-audio'"
    with pytest.raises(FileNotFoundError, match=said):
        ml.load(name)


@pytest.mark.parametrize("name", ["gpt2", "t5-small", "distilgpt2", "owner/shapez"])
def test_names_on_the_hub_are_not_ours(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def ask(path: str, **_: Any) -> None:
        asked.append(path)
        raise OSError

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", ask)
    with pytest.raises(OSError):  # noqa: PT011 (ours)
        ml.load(name)
    assert asked == [name]


@pytest.mark.usefixtures("_no_hub")
def test_a_path_that_ends_in_a_slash() -> None:
    with pytest.raises(FileNotFoundError, match=r"no folder shapez/\. Name a checkpoint folder"):
        ml.load("shapez/")


@pytest.mark.usefixtures("_no_hub")
def test_an_empty_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not the folder that one is in."""
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"name of the model is empty.*'shapes'"):
        ml.load("")


@pytest.mark.usefixtures("_no_hub")
@pytest.mark.parametrize("given", [None, 3, torch.nn.Linear(2, 2), torch.nn.Linear])
def test_neither_a_name_nor_a_path(given: Any) -> None:
    kind = given if isinstance(given, type) else type(given)
    said = rf"name or a path, not {kind.__name__}\. .*'shapes'.*ml\.wrap\(model, processor\)"
    with pytest.raises(TypeError, match=said):
        ml.load(given)


def test_a_name_that_nobody_knows() -> None:
    with pytest.raises(OSError, match="huggingface") as caught:
        ml.load("no-such-model")
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

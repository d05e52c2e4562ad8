"""Results in folders and on the Hugging Face hub, by huggingface_hub's own mixin."""

from __future__ import annotations

import copy
import inspect
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard, ModelHubMixin

import miner_lens as ml

IDENTITY = ml.ModelIdentity("somebody/tiny", "Tiny", 2, 6, fingerprint="2:0123456789abcdef")


def neurons(**options: Any) -> ml.NeuronSet:
    return ml.NeuronSet([(0, 1), (1, 4)], layers=2, neurons=6, **options)


def scores() -> ml.ImportanceScores:
    return ml.ImportanceScores(
        torch.rand(5, 4, 2, 6),
        ["text", "special", "image", "prompt"],
        samples=3,
        means=torch.rand(4, 2, 6),
        identity=IDENTITY,
        info={"attention": "causal"},
    )


def selection() -> ml.Selection:
    return scores().select(ratio=0.5)


KINDS = {
    "NeuronSet": lambda: neurons(identity=IDENTITY, means=torch.rand(2, 6)),
    "Selection": selection,
    "ImportanceScores": scores,
}


def same(one: Any, other: Any) -> bool:
    if not isinstance(one, ml.Selection):
        (tensors, metadata), (others, also) = one.to_parts(), other.to_parts()
        equal = all(torch.equal(tensors[name], others[name]) for name in tensors)
        return equal and metadata == also and one.identity == other.identity
    return list(one) == list(other) and all(same(one[name], other[name]) for name in one)


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_and_back(kind: str, tmp_path: Path) -> None:
    result = KINDS[kind]()
    assert isinstance(result, ModelHubMixin)
    result.save_pretrained(tmp_path / "folder")
    assert {path.name for path in (tmp_path / "folder").iterdir()} == {
        "README.md",
        "config.json",
        type(result).filename,
    }
    for path in (tmp_path / "folder", str(tmp_path / "folder")):
        again = type(result).from_pretrained(path)
        assert type(again) is type(result)
        assert same(again, result)
    assert same(type(result).from_pretrained(tmp_path, subfolder="folder"), result)
    assert same(copy.deepcopy(result), result)
    assert same(pickle.loads(pickle.dumps(result)), result)
    result.save(tmp_path / "file.safetensors")
    assert same(type(result).load(tmp_path / "file.safetensors"), result)


@pytest.mark.parametrize("kind", KINDS)
def test_card(kind: str, tmp_path: Path) -> None:
    result = KINDS[kind]()
    result.save_pretrained(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.library_name == "miner-lens"
    assert card.data.base_model == "somebody/tiny"
    assert "interpretability" in card.data.tags
    assert repr(result) in card.text
    assert f'ml.{kind}.from_pretrained("owner/name")' in card.text
    (tmp_path / "README.md").write_text("mine")
    result.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"


def test_models_without_a_hub_id_are_no_base_model(tmp_path: Path) -> None:
    neurons().save_pretrained(tmp_path)
    assert ModelCard.load(tmp_path / "README.md").data.base_model is None


def test_another_kind_is_refused(tmp_path: Path) -> None:
    scores().save_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"neurons\.safetensors"):
        ml.NeuronSet.from_pretrained(tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_the_hub(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As huggingface_hub uploads and downloads, but into a folder."""
    result, seen = KINDS[kind](), {}

    class Api:
        def __init__(self, token: str | None = None) -> None:
            seen["token"] = token

        def create_repo(self, repo_id: str, **options: Any) -> Any:
            seen["create"] = options
            return SimpleNamespace(repo_id=repo_id)

        def upload_folder(self, folder_path: Path, **options: Any) -> str:
            for path in folder_path.iterdir():
                (tmp_path / path.name).write_bytes(path.read_bytes())
            seen["upload"] = options
            return "https://hub/commit"

    def download(repo_id: str, filename: str, **options: Any) -> str:
        seen.setdefault("download", []).append((repo_id, filename, options["revision"]))
        return str(tmp_path / filename)

    monkeypatch.setattr("huggingface_hub.hub_mixin.HfApi", Api)
    monkeypatch.setattr("huggingface_hub.hub_mixin.hf_hub_download", download)
    monkeypatch.setattr("miner_lens.models.result.hf_hub_download", download)
    url = result.push_to_hub("me/msns", private=True, token="t", branch="v1")
    assert url == "https://hub/commit"
    assert seen["token"] == "t"
    assert seen["create"] == {"private": True, "exist_ok": True}
    assert (seen["upload"]["repo_id"], seen["upload"]["revision"]) == ("me/msns", "v1")
    assert same(type(result).from_pretrained("me/msns", revision="v1"), result)
    files = ("config.json", type(result).filename)
    assert seen["download"] == [("me/msns", file, "v1") for file in files]


def test_signatures_are_those_of_the_mixin() -> None:
    for name in ("save_pretrained", "from_pretrained", "push_to_hub"):
        ours, theirs = getattr(ml.NeuronSet, name), getattr(ModelHubMixin, name)
        assert inspect.signature(ours) == inspect.signature(theirs)


def test_selections() -> None:
    found = selection()
    assert found.identity == IDENTITY
    table = found.to_frame()
    assert list(table.columns) == ["modality", "site", "layer", "neuron"]
    for modality, chosen in found.items():
        rows = table[table["modality"] == modality]
        assert list(zip(rows["layer"], rows["neuron"], strict=True)) == list(chosen)
    assert repr(found) == "Selection(6 of 12 neurons; text: 2, special: 2, image: 2)"
    assert not len(ml.Selection().to_frame())
    assert ml.Selection().identity is None
    assert repr(ml.Selection()) == "Selection(no neurons)"
    with pytest.raises(KeyError, match="No neurons were selected for 'audio'"):
        found["audio"]

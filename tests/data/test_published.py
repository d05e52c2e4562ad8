"""The papers' data sets: each read from a small folder in the published layout, and the hub's."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import miner_lens as ml
from miner_lens.data import datasets
from miner_lens.data.layouts import VOCAL_SOUNDS
from miner_lens.data.media import load_image
from miner_lens.data.published import CAPTION, CLASSIFY, PUBLISHED, SHORTLY, TRANSCRIBE

TEN = ["no", "yes", "yes", "yes", "maybe", "yes", "no", "yes", "yes", "yes"]
SORTED = ("yes",) * 7 + ("no",) * 2 + ("maybe",)


def write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))


def picture(path: Path, colour: str = "red", size: tuple[int, int] = (4, 3)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


def table(path: Path, rows: list[list[str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(rows)


def make_textvqa(folder: Path) -> None:
    row = {"question": "what brand?", "image_id": "003a", "question_id": 34602, "answers": TEN}
    write(folder / "TextVQA_0.5.1_val.json", {"data": [row]})
    picture(folder / "train_images" / "003a.jpg")


def make_coco_caption(folder: Path) -> None:
    said = [{"raw": "A man rides. "}, {"raw": "A rider"}]
    one = {"filepath": "val2014", "filename": "COCO_val2014_000000391895.jpg", "cocoid": 391895}
    other = {"filepath": "train2014", "filename": "x.jpg", "cocoid": 1, "sentences": []}
    images = [one | {"split": "test", "sentences": said}, other | {"split": "train"}]
    write(folder / "dataset_coco.json", {"images": images, "dataset": "coco"})
    picture(folder / one["filepath"] / one["filename"])


def make_mmlu(folder: Path) -> None:
    shots = [[f"shot {n}?", "None", "b", "c", "d", "B"] for n in range(6)]
    table(folder / "dev" / "college_physics_dev.csv", shots)
    asked = [["what, is it?", "1", "2", "3", "4", "C"], ["and?", "5", "6", "7", "8", "A"]]
    table(folder / "test" / "college_physics_test.csv", asked)


def make_msvd_qa(folder: Path) -> None:
    one = {"answer": "rice", "id": 37348, "question": "what is cooked?", "video_id": 1300}
    write(folder / "test_qa.json", [one])
    write(folder / "youtube_mapping.txt", "-4wsuPCjDBc_5_15 vid1\nmv89psg6zh4_33_46 vid1300\n")
    write(folder / "YouTubeClips" / "mv89psg6zh4_33_46.avi", "")


def make_librispeech(folder: Path) -> None:
    chapter = folder / "test-clean" / "1089" / "134686"
    lines = "1089-134686-0000 HE HOPED\n1089-134686-0001 STUFF IT\n"
    write(chapter / "1089-134686.trans.txt", lines)
    write(chapter / "1089-134686-0000.flac", "")


def make_vocalsound(folder: Path) -> None:
    where = "/data/sls/scratch/yuangong/vocalsound2/data/vs_processed/data_16k/f0003_0_cough.wav"
    write(folder / "datafiles" / "te.json", {"data": [{"wav": where, "labels": "/m/01b_21"}]})
    write(folder / "audio_16k" / "f0003_0_cough.wav", "")


def make_vqav2(folder: Path) -> None:
    asked = {"image_id": 262148, "question": "Is it?", "question_id": 262148000}
    write(folder / "v2_OpenEnded_mscoco_val2014_questions.json", {"questions": [asked]})
    said = [
        {"answer": one, "answer_confidence": "yes", "answer_id": n} for n, one in enumerate(TEN)
    ]
    annotated = {"question_id": 262148000, "answers": said, "image_id": 262148}
    write(folder / "v2_mscoco_val2014_annotations.json", {"annotations": [annotated]})
    picture(folder / "val2014" / "COCO_val2014_000000262148.jpg")


def make_docvqa(folder: Path) -> None:
    one = {"questionId": 49153, "question": "What is it?", "answers": ["0.28", ".28"]}
    image = "documents/pybv0228_81.png"
    write(folder / "val_v1.0_withQT.json", {"data": [one | {"image": image}]})
    picture(folder / image)


def make_pmc_vqa(folder: Path) -> None:
    head = ["Figure_path", "Question", "Answer", *(f"Choice {one}" for one in "ABCD")]
    row = ["PMC1_F1.jpg", "Which uptake?", "Focal", "A:Diffuse", "B:Focal", "C:No", "D:None", "B"]
    table(folder / "test.csv", [[*head, "Answer_label"], row])
    picture(folder / "images" / "PMC1_F1.jpg")


def make_lingoqa(folder: Path) -> None:
    import pandas as pd

    names = [f"images/val/seg/{n}.jpg" for n in range(2)]
    row = {"question_id": "q1", "segment_id": "seg", "images": names, "question": "Brake?"}
    folder.mkdir(parents=True, exist_ok=True)
    rows = [row | {"answer": "Yes."}, row | {"answer": "Yes, there."}]
    pd.DataFrame(rows).to_parquet(folder / "val.parquet")
    for name, colour in zip(names, ["red", "blue"], strict=True):
        picture(folder / name, colour, (16, 16))


def make_rs_vqa(folder: Path) -> None:
    off = {"id": 0, "active": False}
    asked = {"id": 1, "img_id": 5, "question": "Is a road present?", "answers_ids": [1]}
    questions = {"questions": [off, asked | {"active": True, "type": "presence"}]}
    write(folder / "USGS_split_test_questions.json", questions)
    said = {"id": 1, "answer": "yes", "question_id": 1, "active": True}
    write(folder / "USGS_split_test_answers.json", {"answers": [off, said]})
    picture(folder / "Data" / "5.tif")


MMLU = (
    "The following are multiple choice questions (with answers) about  college physics.\n\n"
    + "".join(f"shot {n}?\nA. None\nB. b\nC. c\nD. d\nAnswer: B\n\n" for n in range(5))
    + "what, is it?\nA. 1\nB. 2\nC. 3\nD. 4\nAnswer:"
)
FIGURE = (
    "Question: Which uptake?\nContext: N/A\n"
    "Options: ['A:Diffuse', 'B:Focal', 'C:No', 'D:None']\n"
    "\nAnswer with the option's letter from the given choices directly."
)
# What makes the folder; the first sample's id, question, answers and medium; how many there are.
CASES: dict[str, tuple[Callable[[Path], None], str, str, tuple[str, ...], str | None, int]] = {
    "textvqa": (
        make_textvqa,
        "textvqa/34602",
        "what brand?",
        SORTED,
        "train_images/003a.jpg",
        1,
    ),
    "coco_caption": (
        make_coco_caption,
        "coco/391895",
        CAPTION,
        ("A man rides.", "A rider"),
        "val2014/COCO_val2014_000000391895.jpg",
        1,
    ),
    "mmlu": (make_mmlu, "mmlu/college_physics/0", MMLU, ("C",), None, 2),
    "msvd_qa": (
        make_msvd_qa,
        "msvd_qa/37348",
        "what is cooked?" + SHORTLY,
        ("rice",),
        "YouTubeClips/mv89psg6zh4_33_46.avi",
        1,
    ),
    "librispeech": (
        make_librispeech,
        "librispeech/1089-134686-0000",
        TRANSCRIBE,
        ("HE HOPED",),
        "test-clean/1089/134686/1089-134686-0000.flac",
        2,
    ),
    "vocalsound": (
        make_vocalsound,
        "vocalsound/f0003_0_cough",
        CLASSIFY,
        ("Cough",),
        "audio_16k/f0003_0_cough.wav",
        1,
    ),
    "vqav2": (
        make_vqav2,
        "vqav2/262148000",
        "Question: Is it?" + SHORTLY,
        SORTED,
        "val2014/COCO_val2014_000000262148.jpg",
        1,
    ),
    "docvqa": (
        make_docvqa,
        "docvqa/49153",
        "Question: What is it?" + SHORTLY,
        ("0.28", ".28"),
        "documents/pybv0228_81.png",
        1,
    ),
    "pmc_vqa": (make_pmc_vqa, "pmc_vqa/test/0", FIGURE, ("B",), "images/PMC1_F1.jpg", 1),
    "rs_vqa": (
        make_rs_vqa,
        "rs_vqa/1",
        "Question: Is a road present?" + SHORTLY,
        ("yes",),
        "Data/5.tif",
        1,
    ),
}
MAKERS = {name: case[0] for name, case in CASES.items()} | {"lingoqa": make_lingoqa}


def parts(sample: ml.Sample) -> list[dict[str, Any]]:
    (message,) = sample.messages
    assert message["role"] == "user"
    return list(message["content"])


@pytest.mark.parametrize("name", CASES)
def test_the_published_folder(name: str, tmp_path: Path) -> None:
    make, id_, question, answers, medium, count = CASES[name]
    make(tmp_path)
    data = ml.datasets.load(name, path=tmp_path)
    sample = data[0]
    assert len(data) == count
    assert (sample.id, tuple(sample.answers)) == (id_, answers)
    assert parts(sample)[-1] == {"type": "text", "text": question}
    kind = PUBLISHED[name].medium
    if kind is None:
        assert len(parts(sample)) == 1
    else:
        assert parts(sample)[0] == {"type": kind, kind: str(tmp_path / str(medium))}
        assert (tmp_path / str(medium)).is_file()
    assert data.metrics == PUBLISHED[name].metrics
    assert data.name == f"{name}/{next(iter(PUBLISHED[name].splits))}"
    assert data[:1].metrics == data.metrics
    assert all(ml.metrics.find(metric) for metric in data.metrics)


def test_pictures_of_lingoqa_are_side_by_side_and_answers_together(tmp_path: Path) -> None:
    make_lingoqa(tmp_path)
    (sample,) = ml.datasets.load("lingoqa", path=tmp_path)
    assert sample.answers == ("Yes.", "Yes, there.")
    image, text = parts(sample)
    assert text["text"].startswith("Role: You are")
    assert text["text"].endswith("Question: Brake?")
    assert image["image"].size == (32, 16)
    left, right = (image["image"].getpixel((x, 8)) for x in (8, 24))
    assert left[0] > 200 > 100 > left[2]
    assert right[2] > 200 > 100 > right[0]


def test_there_is_a_folder_for_each() -> None:
    assert MAKERS.keys() == PUBLISHED.keys()
    assert set(VOCAL_SOUNDS.values()) == {
        line[3:] for line in map(str.strip, CLASSIFY.split("\n")) if line[:1].isdigit()
    }


@pytest.mark.parametrize("name", MAKERS)
def test_a_folder_that_lacks_something(name: str, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=f"{name}: there is no folder .* Expected"):
        ml.datasets.load(name, path=tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=f"{name}: there is no .* Expected in the folder"):
        ml.datasets.load(name, path=tmp_path / "empty")


@pytest.mark.parametrize("name", sorted(MAKERS.keys() - {"lingoqa", "mmlu", "pmc_vqa"}))
def test_a_malformed_folder(name: str, tmp_path: Path) -> None:
    MAKERS[name](tmp_path)
    for file in tmp_path.rglob("*"):
        if file.suffix in (".json", ".txt"):
            file.write_text("[{}]" if file.suffix == ".json" else "nospace")
    with pytest.raises(ValueError, match=f"{name}: the .* split in .* is not as published"):
        ml.datasets.load(name, path=tmp_path)


def test_malformed_tables(tmp_path: Path) -> None:
    make_pmc_vqa(tmp_path)
    table(tmp_path / "test.csv", [["Figure", "Question"], ["a", "b"]])
    with pytest.raises(ValueError, match=r"pmc_vqa: .*is not as published"):
        ml.datasets.load("pmc_vqa", path=tmp_path)
    (tmp_path / "val.parquet").write_text("no parquet")
    with pytest.raises(ValueError, match=r"lingoqa: .*is not as published"):
        ml.datasets.load("lingoqa", path=tmp_path)
    (tmp_path / "test").mkdir()
    with pytest.raises(ValueError, match="mmlu: there is no sample of the test split"):
        ml.datasets.load("mmlu", path=tmp_path)


def test_splits_and_limits(tmp_path: Path) -> None:
    make_mmlu(tmp_path)
    assert len(ml.datasets.load("mmlu", limit=1, path=tmp_path)) == 1
    with pytest.raises(ValueError, match="Unknown split of mmlu 'train'; there is 'test', 'val"):
        ml.datasets.load("mmlu", "train", path=tmp_path)
    with pytest.raises(ValueError, match="limit is -1"):
        ml.datasets.load("mmlu", limit=-1, path=tmp_path)
    with pytest.raises(ValueError, match="one way only"):
        ml.datasets.load("mmlu", ask="text", path=tmp_path)
    with pytest.raises(ValueError, match="digits comes with a package"):
        ml.datasets.load("digits", path=tmp_path)
    with pytest.raises(ValueError, match="msvd_qa is not on the hub with its media"):
        ml.datasets.load("msvd_qa")
    with pytest.raises(ValueError, match="split of vqav2 on the hub 'train'"):
        ml.datasets.load("vqav2", "train")


def hub_rows(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Rows as the hub has them, with files as tables store them."""
    picture(folder / "image.png", "blue")
    image = {"bytes": (folder / "image.png").read_bytes(), "path": None}
    audio = {"bytes": b"RIFF", "path": "f.wav"}
    asked = {"question": "is it?", "question_id": 7, "image": image}
    dicts = [{"answer": one, "answer_confidence": "yes"} for one in TEN]
    physics = {"subject": "college_physics", "choices": ["1", "2", "3", "4"]}
    return {
        "textvqa": [asked | {"answers": TEN}],
        "vqav2": [asked | {"answers": dicts}],
        "docvqa": [asked | {"answers": ["yes"]}],
        "mmlu": [physics | {"question": f"q{n}?", "answer": 2} for n in range(7)],
        "librispeech": [{"id": "1-2-3", "text": "HE HOPED", "audio": audio}],
        "vocalsound": [{"answer": "Cough", "audio": audio}],
    }


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """A hub in memory; what was asked of it."""
    import datasets as library

    rows = {PUBLISHED[name].hub.path: several for name, several in hub_rows(tmp_path).items()}
    asked: list[tuple[Any, ...]] = []

    def load_dataset(path: str, config: str | None, split: str, streaming: bool = False) -> Any:
        asked.append((path, config, split))
        found = library.Dataset.from_list(rows[path])
        for column, kind in (("image", library.Image()), ("audio", library.Audio())):
            if column in found.column_names:
                found = found.cast_column(column, kind)
        return found.to_iterable_dataset() if streaming else found

    monkeypatch.setattr(library, "load_dataset", load_dataset)
    return asked


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", [name for name, spec in PUBLISHED.items() if spec.hub])
def test_the_hub(name: str, streaming: bool, hub: list[tuple[Any, ...]]) -> None:
    spec = PUBLISHED[name]
    data = ml.datasets.load(name, limit=1, streaming=streaming)
    (sample,) = data
    assert [one.answers for one in data] == [sample.answers]  # and again
    split = next(iter(spec.splits))
    assert hub[0] == (spec.hub.path, spec.hub.config, spec.hub.splits[split])
    assert (data.name, data.metrics) == (f"{name}/{split}", spec.metrics)
    content = parts(sample)
    if spec.medium == "image":
        assert load_image(content[0]["image"]["bytes"]).getpixel((0, 0)) == (0, 0, 255)
        assert sample.answers[0] == "yes"
        assert "is it?" in content[1]["text"]
    elif spec.medium == "audio":
        assert content[0]["audio"]["bytes"] == b"RIFF"
        assert sample.answers in (("HE HOPED",), ("Cough",))
    else:
        assert hub[1] == ("cais/mmlu", "all", "dev")
        assert sample.answers == ("C",)
        assert content[0]["text"].count("Answer: C\n\n") == 5
        assert content[0]["text"].startswith(MMLU.split("shot")[0])


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"textvqa comes through datasets: .*\[datasets\]"):
        ml.datasets.load("textvqa")


def own(split: str | None, limit: int | None, path: Any) -> list[ml.Sample]:
    return [ml.Sample([{"role": "user", "content": f"{split} {path}"}], "a")][:limit]


def test_data_sets_of_other_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = EntryPoint("own", f"{__name__}:own", datasets.ENTRY_POINTS)
    monkeypatch.setattr(datasets, "entry_points", lambda group: [entry])
    (sample,) = ml.datasets.load("own", "test", limit=3, path="here")
    assert sample.messages[0]["content"] == "test here"
    with pytest.raises(ValueError, match=r"Unknown data set 'mine'; there is .*'rs_vqa', 'own'"):
        ml.datasets.load("mine")


def test_a_data_set_is_evaluated_by_its_metrics(shapes: Any, tmp_path: Path) -> None:
    make_textvqa(tmp_path)
    result = ml.evaluate(
        shapes, {"textvqa": ml.datasets.load("textvqa", path=tmp_path)}, max_new_tokens=2
    )
    assert result.metrics == ["containment", "vqa_accuracy"]
    assert list(result.frame["label"]) == ["textvqa"]

"""Data sets in the folders in which they are published, as rows.

A row has `id`, `question`, `answers` and the path of its medium. Each function takes the folder and
what its files call the split.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

Row = dict[str, Any]

SHOTS = 5
VOCAL_SOUNDS = {
    "/m/01j3sz": "Laughter",
    "/m/07plz5l": "Sigh",
    "/m/01b_21": "Cough",
    "/m/0dl9sf8": "Throat clearing",
    "/m/01hsr_": "Sneeze",
    "/m/07ppn3j": "Sniff",
}


def textvqa(folder: Path, split: str) -> list[Row]:
    """TextVQA 0.5.1: `TextVQA_0.5.1_val.json`, and `train_images` for training and validation."""
    images = _there(folder / "train_images")
    return [
        {
            "id": f"textvqa/{one['question_id']}",
            "question": one["question"],
            "answers": most_frequent_first(one["answers"]),
            "image": str(images / f"{one['image_id']}.jpg"),
        }
        for one in _json(folder / f"TextVQA_0.5.1_{split}.json")["data"]
    ]


def coco_caption(folder: Path, split: str) -> list[Row]:
    """COCO in Karpathy's split: his `dataset_coco.json`, and COCO's folders `val2014`, ..."""
    rows = []
    for one in _json(folder / "dataset_coco.json")["images"]:
        if one["split"] == split:
            image = _there(folder / one["filepath"]) / one["filename"]
            captions = [sentence["raw"].strip() for sentence in one["sentences"]]
            row = {"id": f"coco/{one['cocoid']}", "question": "", "answers": captions}
            rows.append(row | {"image": str(image)})
    return rows


def mmlu(folder: Path, split: str) -> list[Row]:
    """MMLU: folders `test` and `dev` with a CSV file of each subject, without a header."""
    rows = []
    for file in sorted(_there(folder / split).glob(f"*_{split}.csv")):
        subject = file.stem.removesuffix(f"_{split}")
        shots = _mmlu_rows(folder / "dev" / f"{subject}_dev.csv", subject)[:SHOTS]
        rows += [row | {"shots": shots} for row in _mmlu_rows(file, subject)]
    return rows


def _mmlu_rows(file: Path, subject: str) -> list[Row]:
    table = _csv(file, header=None)
    return [
        {
            "id": f"mmlu/{subject}/{number}",
            "subject": subject,
            "question": question,
            "choices": choices,
            "answers": [answer],
        }
        for number, (question, *choices, answer) in enumerate(table.itertuples(index=False))
    ]


def msvd_qa(folder: Path, split: str) -> list[Row]:
    """MSVD-QA: `test_qa.json`, `youtube_mapping.txt` and the folder `YouTubeClips`."""
    clips = _there(folder / "YouTubeClips")
    lines = _there(folder / "youtube_mapping.txt").read_text().splitlines()
    names = {number: name for name, number in map(str.split, filter(None, lines))}
    return [
        {
            "id": f"msvd_qa/{one['id']}",
            "question": one["question"],
            "answers": [one["answer"]],
            "video": str(clips / f"{names['vid' + str(one['video_id'])]}.avi"),
        }
        for one in _json(folder / f"{split}_qa.json")
    ]


def librispeech(folder: Path, split: str) -> list[Row]:
    """LibriSpeech: `test-clean/SPEAKER/CHAPTER/`, with a `.trans.txt` beside the FLAC files."""
    rows = []
    for file in sorted(_there(folder / split).glob("*/*/*.trans.txt")):
        for line in filter(None, file.read_text().splitlines()):
            name, text = line.split(" ", 1)
            row = {"id": f"librispeech/{name}", "question": "", "answers": [text]}
            rows.append(row | {"audio": str(file.with_name(f"{name}.flac"))})
    return rows


def vocalsound(folder: Path, split: str) -> list[Row]:
    """VocalSound, the release at 16 kHz: `datafiles/te.json` and the folder `audio_16k`."""
    sounds = _there(folder / "audio_16k")
    rows = []
    for one in _json(folder / "datafiles" / f"{split}.json")["data"]:
        name = one["wav"].rsplit("/", 1)[-1]  # the path is that of its authors
        row = {"id": f"vocalsound/{name.removesuffix('.wav')}", "question": ""}
        rows.append(row | {"answers": [VOCAL_SOUNDS[one["labels"]]], "audio": str(sounds / name)})
    return rows


def vqav2(folder: Path, split: str) -> list[Row]:
    """VQA v2: questions and annotations, and COCO's folder `val2014`."""
    images = _there(folder / f"{split}2014")
    annotated = _json(folder / f"v2_mscoco_{split}2014_annotations.json")["annotations"]
    answers = {one["question_id"]: spoken(one["answers"]) for one in annotated}
    asked = _json(folder / f"v2_OpenEnded_mscoco_{split}2014_questions.json")["questions"]
    return [
        {
            "id": f"vqav2/{one['question_id']}",
            "question": one["question"],
            "answers": answers[one["question_id"]],
            "image": str(images / f"COCO_{split}2014_{one['image_id']:012d}.jpg"),
        }
        for one in asked
    ]


def docvqa(folder: Path, split: str) -> list[Row]:
    """DocVQA, single page: `val_v1.0.json` (or `val_v1.0_withQT.json`), folder `documents`."""
    _there(folder / "documents")
    plain = folder / f"{split}_v1.0.json"
    typed = folder / f"{split}_v1.0_withQT.json"
    return [
        {
            "id": f"docvqa/{one['questionId']}",
            "question": one["question"],
            "answers": list(one["answers"]),
            "image": str(folder / one["image"]),
        }
        for one in _json(typed if typed.is_file() else plain)["data"]
    ]


def pmc_vqa(folder: Path, split: str) -> list[Row]:
    """PMC-VQA: `test.csv`, and the figures in `figures` or `images`."""
    figures = folder / "figures"
    images = figures if figures.is_dir() else _there(folder / "images")
    return [
        {
            "id": f"pmc_vqa/{split}/{number}",
            "question": one["Question"],
            "choices": [one[f"Choice {letter}"] for letter in "ABCD"],
            "answers": [str(one["Answer_label"]).strip()],
            "image": str(images / one["Figure_path"]),
        }
        for number, one in enumerate(_csv(folder / f"{split}.csv").to_dict("records"))
    ]


def lingoqa(folder: Path, split: str) -> list[Row]:
    """LingoQA's evaluation: `val.parquet`, whose images are paths in the folder."""
    import pandas as pd

    rows: dict[tuple[str, str], Row] = {}
    for one in pd.read_parquet(_there(folder / f"{split}.parquet")).to_dict("records"):
        key = one["question_id"], one["segment_id"]
        images = [str(folder / name) for name in one["images"]]
        row = {"id": f"lingoqa/{key[0]}", "question": one["question"], "answers": []}
        rows.setdefault(key, row | {"images": images})["answers"].append(one["answer"])
    return list(rows.values())


def rs_vqa(folder: Path, split: str) -> list[Row]:
    """RSVQA of high resolution: `USGS_split_test_questions.json`, answers, folder `Data`."""
    images = _there(folder / "Data")
    said = _json(folder / f"USGS_split_{split}_answers.json")["answers"]
    rows = []
    for one in _json(folder / f"USGS_split_{split}_questions.json")["questions"]:
        if one["active"]:
            image = images / f"{one['img_id']}.png"
            row = {"id": f"rs_vqa/{one['id']}", "question": one["question"]}
            row["answers"] = [said[place]["answer"] for place in one["answers_ids"]]
            rows.append(
                row | {"image": str(image if image.is_file() else image.with_suffix(".tif"))}
            )
    return rows


def most_frequent_first(answers: Iterable[str]) -> list[str]:
    """All answers, so that the first, where only one is asked for, is the one most people gave."""
    given = list(answers)
    return sorted(given, key=lambda answer: -given.count(answer))


def spoken(answers: Iterable[Mapping[str, Any]]) -> list[str]:
    """What annotators of VQA said, the most frequent first."""
    return most_frequent_first(one["answer"] for one in answers)


def _there(path: Path) -> Path:
    if not path.exists():
        raise FileNotFoundError(f"there is no {path}")
    return path


def _json(path: Path) -> Any:
    return json.loads(_there(path).read_text(encoding="utf-8"))


def _csv(path: Path, **options: Any) -> Any:
    import pandas as pd

    # Some options of MMLU are the word None.
    return pd.read_csv(_there(path), dtype=str, keep_default_na=False, **options)

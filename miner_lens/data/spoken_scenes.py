"""Spoken scenes: questions about a spoken description of one coloured shape."""

from __future__ import annotations

import importlib.util
import json
import zipfile
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from miner_lens.data.sample_list import SampleList, check_known, draw, user_sample

ASKS = {
    "audio": ("audio",),
    "text": ("text",),
    "both": ("audio", "text"),
    "voice": ("voice",),
}
SPOKEN_SCENES = Path(__file__).parents[1] / "organisms" / "spoken-scenes.zip"


def spoken_scenes(
    file: str | Path = SPOKEN_SCENES,
    ask: str = "audio",
    limit: int | None = None,
    label: str | None = None,
) -> SampleList:
    """Read a file that `python -m miner_lens.training.speak` has written.

    Args:
        file: Such a file, by default the test split that ships.
        ask: As for `load("spoken-scenes")`.
        limit: As for `load`.
        label: The field of the file's index by which samples are labelled, such as `"voice"`,
            `"noise"` or `"color"`; None: not at all.

    Returns:
        Samples whose sounds are the bytes of Ogg files.

    Raises:
        ValueError: The index has no field `label`, or there is no such way to ask.
        ImportError: soundfile is missing, and the questions are heard.
    """
    file = Path(file)
    check_known("ask", ask, ASKS)
    modalities = ASKS[ask]
    if ask != "text" and importlib.util.find_spec("soundfile") is None:
        raise ImportError(
            "Hearing spoken-scenes needs soundfile: pip install 'miner-lens[audio]'. Asked about "
            'the "text", it needs nothing.'
        )
    name = "spoken-scenes/test" if file == SPOKEN_SCENES else file.stem
    with zipfile.ZipFile(file) as archive:
        lines = archive.read("index.jsonl").decode().splitlines()
        read = cache(archive.read)

        def content(row: dict[str, str], modality: str) -> list[dict[str, Any]]:
            if modality == "text":
                return [{"type": "text", "text": f"{row['description']} {row['question']}"}]
            described = {"type": "audio", "audio": read(row["clip"])}
            if modality == "voice":
                return [described, {"type": "audio", "audio": read(row["question_clip"])}]
            return [described, {"type": "text", "text": row["question"]}]

        rows = [(number, json.loads(line)) for number, line in enumerate(lines)]
        if ask == "voice":
            rows = [(number, row) for number, row in rows if row["question_clip"]]
        if label is not None and rows:
            check_known("label", label, rows[0][1])
        samples = [
            replace(
                user_sample(f"{name}/{number}/{modality}", content(row, modality), row["answer"]),
                label=None if label is None else str(row[label]),
            )
            for number, row in draw(rows, limit, len(modalities))
            for modality in modalities
        ]
    return SampleList(samples[:limit], f"{name}/{ask}")


def load(split: str, ask: str, limit: int | None) -> SampleList:
    """The split that ships; see `miner_lens.data.datasets.load`.

    Raises:
        ValueError: The training split is asked for.
    """
    if split != "test":
        raise ValueError(
            "Of spoken-scenes only the test split ships. To speak training scenes (with "
            "espeak-ng): python -m miner_lens.training.speak --split train --out train.zip; "
            'to read them: miner_lens.data.datasets.spoken_scenes("train.zip").'
        )
    return spoken_scenes(ask=ask, limit=limit)

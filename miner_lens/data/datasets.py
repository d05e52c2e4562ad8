"""Data sets as lists of samples, ready to be mined."""

from __future__ import annotations

import importlib.util
import json
import random
import zipfile
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any, SupportsIndex, overload

from miner_lens.data.rows import from_rows
from miner_lens.data.sample import Sample

__all__ = ["SampleList", "describe", "from_rows", "load", "scene", "spoken_scenes"]

COLOURS = {
    "red": (255, 0, 0),
    "green": (0, 255, 0),
    "blue": (0, 0, 255),
    "black": (0, 0, 0),
    "gray": (128, 128, 128),
    "teal": (0, 128, 128),
    "brown": (165, 42, 42),
    "yellow": (255, 255, 0),
}
SHAPES = ("circle", "rectangle", "triangle")
DESCRIPTIONS = (
    "the picture shows a {colour} {shape}.",
    "there is a {colour} {shape} on a plain background.",
    "a {shape} is drawn here and it is {colour}.",
    "the only thing to see is a {colour} {shape}.",
    "somebody painted a {shape} in {colour}.",
    "{colour} is the color of the {shape} that we see.",
    "in front of a pale wall hangs a {colour} {shape}.",
    "on this card you find one {shape}, which is {colour}.",
    "this drawing has a {colour} {shape} in it.",
    "we are looking at a {shape} that was filled with {colour}.",
    "one {colour} {shape} and nothing else.",
    "the scene: a single {shape}, all {colour}.",
)


class SampleList(list[Sample]):
    """Samples that know what data set they are, for the scores mined from them; so do slices."""

    def __init__(self, samples: Iterable[Sample], name: str) -> None:
        super().__init__(samples)
        self.name = name

    @overload
    def __getitem__(self, index: SupportsIndex) -> Sample: ...

    @overload
    def __getitem__(self, index: slice) -> SampleList: ...

    def __getitem__(self, index: SupportsIndex | slice) -> Sample | SampleList:
        if isinstance(index, slice):
            return SampleList(super().__getitem__(index), self.name)
        return super().__getitem__(index)


SPLITS = ("train", "test")
SPOKEN_SCENES = Path(__file__).parents[1] / "organisms" / "spoken-scenes.zip"


def describe(shape: str, colour: str, image_id: int) -> str:
    """One sentence that says what an easy-VQA image shows; the image's id picks the wording.

    Example:
        >>> describe("rectangle", "blue", 0)
        'the picture shows a blue rectangle.'
    """
    return DESCRIPTIONS[image_id % len(DESCRIPTIONS)].format(shape=shape, colour=colour)


@cache
def scene(path: str) -> tuple[str, str]:
    """Shape and colour of an easy-VQA image, read off its pixels, because the questions alone
    leave one image in nine open.

    The colour is exact inside the shape, the background plain. A rectangle fills its
    bounding box, a circle at least 80 % of it, a triangle at most 70 %.
    """
    from PIL import Image, ImageChops

    with Image.open(path) as file:
        image = file.convert("RGB")
    counts: list[tuple[int, Any]] = sorted(image.getcolors() or (), reverse=True)
    names = {rgb: name for name, rgb in COLOURS.items()}
    drawn = [names[rgb] for _, rgb in counts if rgb in names]
    (background_area, background), *_ = counts
    box = ImageChops.difference(image, Image.new("RGB", image.size, background)).getbbox()
    if box is None or len(drawn) != 1:
        raise ValueError(f"{path} shows {len(drawn)} of the colours {', '.join(COLOURS)}, not one.")
    left, top, right, bottom = box
    area = image.width * image.height - background_area
    fill = area / ((right - left) * (bottom - top))
    return "rectangle" if fill == 1 else "circle" if fill > 0.75 else "triangle", drawn[0]


def _easy_vqa(split: str, ask: str, limit: int | None) -> SampleList:
    try:
        import easy_vqa
    except ImportError as error:
        raise ImportError(
            "The data set easy-vqa comes with the package easy-vqa: pip install miner-lens[demo]"
        ) from error

    modalities = _EASY_VQA_ASKS[ask]
    if split == "train":
        questions, paths = easy_vqa.get_train_questions(), easy_vqa.get_train_image_paths()
    else:
        questions, paths = easy_vqa.get_test_questions(), easy_vqa.get_test_image_paths()
    # The file keeps an image's questions together, so its head would show a few images only.
    rows = _drawn(list(enumerate(zip(*questions, strict=True))), limit, len(modalities))

    def content(question: str, image_id: int, modality: str) -> list[dict[str, Any]]:
        path = paths[image_id]
        if modality == "image":
            return [{"type": "image", "image": path}, {"type": "text", "text": question}]
        description = describe(*scene(path), image_id)
        return [{"type": "text", "text": f"{description} {question}"}]

    samples = [
        _question(
            f"easy-vqa/{split}/{row}/{modality}", content(question, image_id, modality), answer
        )
        for row, (question, answer, image_id) in rows
        for modality in modalities
    ]
    return SampleList(samples[:limit], f"easy-vqa/{split}/{ask}")


def _drawn(rows: list[Any], limit: int | None, times: int) -> list[Any]:
    """As many rows as make `limit` samples where each makes `times`: a seeded draw, in order."""
    if limit is None:
        return rows
    places = list(range(len(rows)))
    random.Random(0).shuffle(places)
    return [rows[place] for place in sorted(places[: -(-limit // times)])]


def _question(name: str, content: list[dict[str, Any]], answer: str) -> Sample:
    return Sample([{"role": "user", "content": content}], (answer,), name)


def spoken_scenes(
    file: str | Path = SPOKEN_SCENES, ask: str = "audio", limit: int | None = None
) -> SampleList:
    """Read a file that `python -m miner_lens.training.speak` has written.

    Args:
        file: Such a file, by default the test split that ships.
        ask: As for `load("spoken-scenes")`.
        limit: As for `load`.

    Returns:
        Samples whose sounds are the bytes of Ogg files.
    """
    file = Path(file)
    _check("ask", ask, _SPOKEN_ASKS)
    modalities = _SPOKEN_ASKS[ask]
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
        samples = [
            _question(f"{name}/{number}/{modality}", content(row, modality), row["answer"])
            for number, row in _drawn(rows, limit, len(modalities))
            for modality in modalities
        ]
    return SampleList(samples[:limit], f"{name}/{ask}")


def _shipped_scenes(split: str, ask: str, limit: int | None) -> SampleList:
    if split != "test":
        raise ValueError(
            "Of spoken-scenes only the test split ships. To speak training scenes (with "
            "espeak-ng): python -m miner_lens.training.speak --split train --out train.zip; "
            'to read them: miner_lens.data.datasets.spoken_scenes("train.zip").'
        )
    return spoken_scenes(ask=ask, limit=limit)


_EASY_VQA_ASKS = {"image": ("image",), "text": ("text",), "both": ("image", "text")}
_SPOKEN_ASKS = {
    "audio": ("audio",),
    "text": ("text",),
    "both": ("audio", "text"),
    "voice": ("voice",),
}
# The ways to ask of each data set, the default first, and what loads it.
_DATA_SETS = {
    "easy-vqa": (_EASY_VQA_ASKS, _easy_vqa),
    "spoken-scenes": (_SPOKEN_ASKS, _shipped_scenes),
}


def load(
    name: str, split: str = "test", limit: int | None = None, ask: str | None = None
) -> SampleList:
    """Load a data set by name, as a list of samples.

    `easy-vqa` (Zhou 2019) asks about images of one coloured shape: 38,575 training and
    9,673 test questions with 13 answers. It comes with the package `easy-vqa`
    (`pip install miner-lens[demo]`).

    `spoken-scenes` asks about a spoken description of one coloured shape: 480 test questions
    with 18 answers, about 240 clips, spoken by espeak-ng in voices that the organism `speech`
    has never heard. It ships with this package; hearing it needs `miner-lens[audio]`.

    Neither needs a network.

    Args:
        name: The data set: `"easy-vqa"` or `"spoken-scenes"`.
        split: `"train"` or `"test"`; of spoken-scenes there is only the test split.
        limit: Load so many samples at most: a seeded draw, always the same, in file order,
            in which a smaller limit's questions are among those of a larger one.
        ask: What a question is asked about. easy-vqa: the `"image"` (the default), a
            one-sentence description of the same scene (`"text"`), or `"both"`, one after the
            other. spoken-scenes: the spoken description (`"audio"`, the default), the same
            in writing (`"text"`), `"both"`, one after the other, or the spoken description
            with the question spoken too (`"voice"`).

    Raises:
        ValueError: The name, split or way of asking is unknown, or the limit is negative.
        ImportError: The package that carries or reads the data is missing.

    Example:
        >>> sample = load("easy-vqa", limit=1, ask="text")[0]
        >>> sample.messages[0]["role"]
        'user'
    """
    name = name.replace("_", "-")
    _check("data set", name, _DATA_SETS)
    asks, loader = _DATA_SETS[name]
    ask = next(iter(asks)) if ask is None else ask
    _check("split", split, SPLITS)
    _check("ask", ask, asks)
    if limit is not None and limit < 0:
        raise ValueError(f"limit is {limit}; give a number of samples, or None for all of them.")
    return loader(split, ask, limit)


def _check(what: str, given: str, known: Iterable[str]) -> None:
    if given not in known:
        raise ValueError(f"Unknown {what} {given!r}; there is {', '.join(map(repr, known))}.")

"""easy-VQA: questions about images of one coloured shape."""

from __future__ import annotations

import importlib.util
import json
import zipfile
from collections import defaultdict
from functools import cache
from pathlib import Path
from typing import Any

from miner_lens.data.sample_list import SampleList, draw, user_sample

ASKS = {
    "image": ("image",),
    "text": ("text",),
    "both": ("image", "text"),
    "audio": ("audio",),
    "voice": ("voice",),
}
SPOKEN = Path(__file__).parents[1] / "organisms" / "spoken-easy-vqa.zip"
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


@cache
def _clips() -> dict[str, list[bytes]]:
    """Sounds of each description and question, in one voice or several."""
    if importlib.util.find_spec("soundfile") is None:
        raise ImportError(
            "Hearing easy-vqa needs soundfile: pip install 'miner-lens[audio]'. Asked about the "
            '"image" or the "text", it needs nothing.'
        )
    clips = defaultdict(list)
    with zipfile.ZipFile(SPOKEN) as archive:
        for line in archive.read("index.jsonl").decode().splitlines():
            row = json.loads(line)
            clips[row["text"]].append(archive.read(row["clip"]))
    return dict(clips)


def spoken(text: str, nth: int = 0) -> dict[str, Any]:
    """A description or a question, spoken by espeak-ng in a voice that no organism has heard.

    Args:
        text: What is said.
        nth: Picks the voice, where there are several.

    Raises:
        ImportError: The package soundfile is missing, by which processors hear it.
    """
    voices = _clips()[text]
    return {"type": "audio", "audio": voices[nth % len(voices)]}


def load(split: str, ask: str, limit: int | None) -> SampleList:
    """Read the package `easy-vqa`; see `miner_lens.data.datasets.load`.

    Raises:
        ImportError: The package is missing, or soundfile where something is spoken.
    """
    try:
        import easy_vqa
    except ImportError as error:
        raise ImportError(
            "The data set easy-vqa comes with the package easy-vqa: pip install miner-lens[demo]"
        ) from error

    modalities = ASKS[ask]
    if split == "train":
        questions, paths = easy_vqa.get_train_questions(), easy_vqa.get_train_image_paths()
    else:
        questions, paths = easy_vqa.get_test_questions(), easy_vqa.get_test_image_paths()
    # The file keeps an image's questions together, so its head would show a few images only.
    rows = draw(list(enumerate(zip(*questions, strict=True))), limit, len(modalities))

    def content(row: int, question: str, image_id: int, modality: str) -> list[dict[str, Any]]:
        path = paths[image_id]
        shown, asked = {"type": "image", "image": path}, {"type": "text", "text": question}
        if modality == "image":
            return [shown, asked]
        if modality == "voice":
            return [shown, spoken(question, row)]
        description = describe(*scene(path), image_id)
        if modality == "audio":
            return [spoken(description), asked]
        return [{"type": "text", "text": f"{description} {question}"}]

    samples = [
        user_sample(
            f"easy-vqa/{split}/{row}/{modality}", content(row, question, image_id, modality), answer
        )
        for row, (question, answer, image_id) in rows
        for modality in modalities
    ]
    return SampleList(samples[:limit], f"easy-vqa/{split}/{ask}")

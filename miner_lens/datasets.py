"""Data sets as lists of samples, ready to be mined."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any

from miner_lens.sample import Sample

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
    """Samples that know what data set they are, for the scores mined from them."""

    def __init__(self, samples: Iterable[Sample], name: str) -> None:
        super().__init__(samples)
        self.name = name


ASKS = {"image": ("image",), "text": ("text",), "both": ("image", "text")}
SPLITS = ("train", "test")


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


def _easy_vqa(split: str, modalities: Sequence[str], limit: int | None) -> list[Sample]:
    try:
        import easy_vqa
    except ImportError as error:
        raise ImportError(
            "The data set easy-vqa comes with the package easy-vqa: pip install miner-lens[demo]"
        ) from error

    if split == "train":
        questions, paths = easy_vqa.get_train_questions(), easy_vqa.get_train_image_paths()
    else:
        questions, paths = easy_vqa.get_test_questions(), easy_vqa.get_test_image_paths()
    rows = list(enumerate(zip(*questions, strict=True)))
    if limit is not None:
        # The file keeps an image's questions together, so its head would show a few images only.
        random.Random(0).shuffle(rows)
        rows = sorted(rows[: -(-limit // len(modalities))])

    def content(question: str, image_id: int, modality: str) -> list[dict[str, Any]]:
        path = paths[image_id]
        if modality == "image":
            return [{"type": "image", "image": path}, {"type": "text", "text": question}]
        description = describe(*scene(path), image_id)
        return [{"type": "text", "text": f"{description} {question}"}]

    samples = [
        Sample(
            messages=[{"role": "user", "content": content(question, image_id, modality)}],
            answers=(answer,),
            id=f"easy-vqa/{split}/{row}/{modality}",
        )
        for row, (question, answer, image_id) in rows
        for modality in modalities
    ]
    return samples[:limit]


_LOADERS = {"easy-vqa": _easy_vqa}


def load(
    name: str, split: str = "test", limit: int | None = None, ask: str = "image"
) -> SampleList:
    """Load a data set by name, as a list of samples.

    `easy-vqa` (Zhou 2019) asks about images of one coloured shape: 38,575 training and
    9,673 test questions with 13 answers. It comes with the package `easy-vqa`
    (`pip install miner-lens[demo]`) and needs no network.

    Args:
        name: The data set; `"easy-vqa"` is the only one so far.
        split: `"train"` or `"test"`.
        limit: Load so many samples at most: a seeded draw, always the same, in file order,
            in which a smaller limit's questions are among those of a larger one.
        ask: What a question is asked about: the `"image"`, a one-sentence description of
            the same scene (`"text"`), or `"both"`, one after the other.

    Raises:
        ValueError: The name, split or way of asking is unknown, or the limit is negative.
        ImportError: The package that carries the data is missing.

    Example:
        >>> sample = load("easy-vqa", limit=1, ask="text")[0]
        >>> sample.messages[0]["role"]
        'user'
    """
    loader = _LOADERS.get(name.replace("_", "-"))
    for what, given, known in (
        ("data set", name, _LOADERS if loader is None else (name,)),
        ("split", split, SPLITS),
        ("ask", ask, ASKS),
    ):
        if given not in known:
            raise ValueError(f"Unknown {what} {given!r}; there is {', '.join(map(repr, known))}.")
    if limit is not None and limit < 0:
        raise ValueError(f"limit is {limit}; give a number of samples, or None for all of them.")
    assert loader is not None
    return SampleList(loader(split, ASKS[ask], limit), f"{name.replace('_', '-')}/{split}/{ask}")

"""The papers' data sets, from the Hugging Face hub or from the folder in which they come.

Prompts are those of MINER's and MMNeuron's published code. A data set is a row of `PUBLISHED`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import islice
from os import PathLike
from pathlib import Path
from typing import Any

from PIL import Image

from miner_lens.data import layouts
from miner_lens.data.layouts import SHOTS, Row, most_frequent_first, spoken
from miner_lens.data.rows import Rows, RowStream
from miner_lens.data.sample import Sample
from miner_lens.data.sample_list import check_known, draw

SHORTLY = "\nAnswer the question using a single word or phrase."
CAPTION = (
    "Generate a caption for the image in one short sentence, similar to these examples from the "
    "COCO dataset: 1. A man with a red helmet on a small moped on a dirt road. 2. Man riding a "
    "motor bike on a dirt road on the countryside. 3. A man riding on the back of a motorcycle. "
    "4. A man in a red shirt and a red hat is on a motorcycle on a hill side. "
    "Now, describe the image."
)
TRANSCRIBE = (
    "Please transcribe the following audio directly into plain text without any additional "
    "explanations, prefixes, or descriptions. Only output the transcription of the spoken content "
    "in the audio."
)
# Lines are indented in the published prompt.
CLASSIFY = ("\n" + " " * 17).join(
    [
        "You are a sound classification model. Your task is to classify a given audio sample into "
        "one of the following categories based on its content:",
        "1. Laughter",
        "2. Sigh",
        "3. Cough",
        "4. Throat clearing",
        "5. Sneeze",
        "6. Sniff",
        "Please analyze the audio sample and provide the corresponding category name.",
        "",
    ]
)
DRIVER = (
    "Role: You are an advanced AI assistant installed on the Ego vehicle, equipped with "
    "conversational analysis capabilities for discussing autonomous driving scenarios. The "
    "perspective presented is from the point-of-view of the Ego vehicle, where the camera is "
    "mounted. It's important to note that the Ego vehicle itself is not visible in the images "
    "provided. Question: {question}"
)


@dataclass(frozen=True)
class Hub:
    """Where a data set is on the Hugging Face hub.

    Attributes:
        path: Its id.
        config: Its configuration, if it has several.
        splits: What it calls our splits.
        row: Makes a row of `layouts` of one of its rows.
        shots: The split of worked examples, if questions are asked after some.
    """

    path: str
    config: str | None
    splits: Mapping[str, str]
    row: Callable[[Row], Row]
    shots: str | None = None


@dataclass(frozen=True)
class Published:
    """How a data set is read and asked.

    Attributes:
        layout: Reads its folder.
        splits: What its files call our splits; the first is the default.
        metrics: The names of those by which its answers are measured.
        prompt: What is asked of a row.
        medium: The kind of its medium, which is also the row's column.
        hub: Where it is on the hub; None where it has to be downloaded by hand.
    """

    layout: Callable[[Path, str], list[Row]]
    splits: Mapping[str, str]
    metrics: tuple[str, ...]
    prompt: Callable[[Row], str]
    medium: str | None = None
    hub: Hub | None = None


def _shortly(row: Row) -> str:
    return f"Question: {row['question']}{SHORTLY}"


def _multiple_choice(row: Row) -> str:
    # Subjects have two spaces before them, as in the code of MMLU's authors.
    subject = row["subject"].replace("_", " ")
    head = f"The following are multiple choice questions (with answers) about  {subject}.\n\n"
    shots = "".join(f"{_options(shot)} {shot['answers'][0]}\n\n" for shot in row["shots"])
    return head + shots + _options(row)


def _options(row: Row) -> str:
    options = zip("ABCD", row["choices"], strict=True)
    return "\n".join([row["question"], *(f"{a}. {text}" for a, text in options), "Answer:"])


def _of_figure(row: Row) -> str:
    return (
        f"Question: {row['question']}\nContext: N/A\nOptions: {row['choices']}\n"
        "\nAnswer with the option's letter from the given choices directly."
    )


VQA = {"validation": "validation", "train": "train"}
TEST = {"test": "test", "validation": "validation"}

PUBLISHED = {
    "textvqa": Published(
        layouts.textvqa,
        {"validation": "val", "train": "train"},
        ("containment", "vqa_accuracy"),
        lambda row: str(row["question"]),
        "image",
        Hub(
            "lmms-lab-encoder/textvqa",
            None,
            VQA,
            lambda row: {
                "id": f"textvqa/{row['question_id']}",
                "question": row["question"],
                "answers": most_frequent_first(row["answers"]),
                "image": row["image"],
            },
        ),
    ),
    "coco_caption": Published(
        layouts.coco_caption,
        {"test": "test", "validation": "val", "train": "train"},
        ("bleu", "cider", "tfidf_cosine"),
        lambda row: CAPTION,
        "image",
    ),
    "mmlu": Published(
        layouts.mmlu,
        {"test": "test", "validation": "val"},
        ("multiple_choice_published", "multiple_choice"),
        _multiple_choice,
        None,
        Hub(
            "cais/mmlu",
            "all",
            TEST,
            lambda row: {
                "subject": row["subject"],
                "question": row["question"],
                "choices": row["choices"],
                "answers": ["ABCD"[row["answer"]]],
            },
            shots="dev",
        ),
    ),
    "msvd_qa": Published(
        layouts.msvd_qa,
        {"test": "test", "validation": "val", "train": "train"},
        ("containment",),
        lambda row: f"{row['question']}{SHORTLY}",
        "video",
    ),
    "librispeech": Published(
        layouts.librispeech,
        {"test": "test-clean", "validation": "dev-clean"},
        ("word_recognition_rate_published", "word_recognition_rate"),
        lambda row: TRANSCRIBE,
        "audio",
        Hub(
            "openslr/librispeech_asr",
            "clean",
            TEST,
            lambda row: {
                "id": f"librispeech/{row['id']}",
                "answers": [row["text"]],
                "audio": row["audio"],
            },
        ),
    ),
    "vocalsound": Published(
        layouts.vocalsound,
        {"test": "te", "validation": "val", "train": "tr", "all": "all"},
        ("containment",),
        lambda row: CLASSIFY,
        "audio",
        Hub(
            "lmms-lab-audio/vocalsound",
            None,
            {"test": "test", "validation": "val"},
            lambda row: {"answers": [row["answer"]], "audio": row["audio"]},
        ),
    ),
    "vqav2": Published(
        layouts.vqav2,
        {"validation": "val", "train": "train"},
        ("vqa_accuracy", "exact_match"),
        _shortly,
        "image",
        Hub(
            "lmms-lab-encoder/VQAv2",
            None,
            {"validation": "validation"},
            lambda row: {
                "id": f"vqav2/{row['question_id']}",
                "question": row["question"],
                "answers": spoken(row["answers"]),
                "image": row["image"],
            },
        ),
    ),
    "docvqa": Published(
        layouts.docvqa,
        {"validation": "val", "train": "train"},
        ("anls",),
        _shortly,
        "image",
        Hub(
            "pixparse/docvqa-single-page-questions",
            None,
            VQA,
            lambda row: {
                "id": f"docvqa/{row['question_id']}",
                "question": row["question"],
                "answers": row["answers"],
                "image": row["image"],
            },
        ),
    ),
    "pmc_vqa": Published(
        layouts.pmc_vqa,
        {"test": "test", "train": "train"},
        ("multiple_choice",),
        _of_figure,
        "image",
    ),
    "lingoqa": Published(
        layouts.lingoqa,
        {"validation": "val"},
        ("bleu", "cider"),
        lambda row: DRIVER.format(question=row["question"]),
        "image",
    ),
    "rs_vqa": Published(
        layouts.rs_vqa,
        {"test": "test", "validation": "val", "train": "train"},
        ("exact_match",),
        _shortly,
        "image",
    ),
}


def load(
    name: str,
    split: str | None = None,
    limit: int | None = None,
    path: str | PathLike[str] | None = None,
    streaming: bool = False,
) -> Rows | RowStream:
    """Read one of `PUBLISHED`; see `miner_lens.data.datasets.load`.

    Raises:
        ValueError: There is no such split, it is not on the hub, or the folder is malformed.
        FileNotFoundError: There is no such folder, or something is missing in it.
        ImportError: `datasets` is missing.
    """
    spec = PUBLISHED[name]
    split = next(iter(spec.splits)) if split is None else split
    check_known(f"split of {name}", split, spec.splits)
    if path is None:
        return _from_hub(name, spec, split, limit, streaming)
    rows = draw(_from_folder(name, spec, split, Path(path).expanduser()), limit, 1)
    return Rows(rows, _Asker(spec), spec.metrics, f"{name}/{split}")


def _from_folder(name: str, spec: Published, split: str, folder: Path) -> list[Row]:
    expected = f"Expected in the folder: {spec.layout.__doc__}"
    if not folder.is_dir():
        raise FileNotFoundError(f"{name}: there is no folder {folder}. {expected}")
    try:
        rows = spec.layout(folder, spec.splits[split])
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{name}: {error}. {expected}") from error
    except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(
            f"{name}: the {split} split in {folder} is not as published "
            f"({type(error).__name__}: {error}). {expected}"
        ) from error
    if not rows:
        raise ValueError(f"{name}: there is no sample of the {split} split in {folder}. {expected}")
    return rows


def _from_hub(
    name: str, spec: Published, split: str, limit: int | None, streaming: bool
) -> Rows | RowStream:
    if spec.hub is None:
        raise ValueError(
            f"{name} is not on the hub with its media: download it and give its folder as path. "
            f"Expected there: {spec.layout.__doc__}"
        )
    check_known(f"split of {name} on the hub", split, spec.hub.splits)
    try:
        import datasets
    except ImportError as error:
        raise ImportError(
            f"{name} comes through datasets: pip install 'miner-lens[datasets]', or give the "
            "folder that it is in as path."
        ) from error
    hub = spec.hub
    table: Any = datasets.load_dataset(
        hub.path, hub.config, split=hub.splits[split], streaming=streaming
    )
    shots: dict[str, list[Row]] = {}
    if hub.shots is not None:
        for row in datasets.load_dataset(hub.path, hub.config, split=hub.shots):
            shots.setdefault(row["subject"], []).append(hub.row(row))
    if spec.medium is not None:
        # Files are opened when a sample is asked, and by what opens everybody's.
        kind = {"image": datasets.Image, "audio": datasets.Audio}[spec.medium]
        table = table.cast_column(spec.medium, kind(decode=False))
    make = _Asker(spec, hub.row, {subject: several[:SHOTS] for subject, several in shots.items()})
    if streaming:
        stream = _First(table, limit)
        return RowStream(stream, make, spec.metrics, f"{name}/{split}")
    if limit is not None:
        table = table.select(draw(list(range(len(table))), limit, 1))
    return Rows(table, make, spec.metrics, f"{name}/{split}")


@dataclass(frozen=True)
class _First:
    """The first rows of a stream, each time anew."""

    rows: Any
    limit: int | None

    def __iter__(self) -> Any:
        return islice(iter(self.rows), self.limit)


@dataclass(frozen=True)
class _Asker:
    """Makes samples of rows."""

    spec: Published
    row: Callable[[Row], Row] = dict
    shots: Mapping[str, list[Row]] = field(default_factory=dict)

    def __call__(self, given: Mapping[str, Any]) -> Sample:
        row = self.row(dict(given))
        if self.shots:
            row["shots"] = self.shots[row["subject"]]
        content: list[dict[str, Any]] = [{"type": "text", "text": self.spec.prompt(row)}]
        if self.spec.medium is not None:
            source = _side_by_side(row["images"]) if "images" in row else row[self.spec.medium]
            content.insert(0, {"type": self.spec.medium, self.spec.medium: source})
        return Sample([{"role": "user", "content": content}], row["answers"], row.get("id"))


def _side_by_side(paths: list[str]) -> Image.Image:
    """Pictures of one height as one, from left to right."""
    pictures = [Image.open(path).convert("RGB") for path in paths]
    whole = Image.new("RGB", (sum(one.width for one in pictures), pictures[0].height))
    left = 0
    for one in pictures:
        whole.paste(one, (left, 0))
        left += one.width
    return whole

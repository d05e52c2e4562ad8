"""Data sets by name, as lists of samples, ready to be mined."""

from __future__ import annotations

from importlib.metadata import entry_points
from os import PathLike
from typing import Literal, overload

from miner_lens.data import digits, easy_vqa, published, text_domains
from miner_lens.data import spoken_scenes as spoken
from miner_lens.data.easy_vqa import COLOURS, DESCRIPTIONS, SHAPES, describe, scene
from miner_lens.data.published import PUBLISHED
from miner_lens.data.rows import Rows, RowStream, from_rows
from miner_lens.data.sample_list import SampleList, check_known
from miner_lens.data.spoken_scenes import SPOKEN_SCENES, spoken_scenes

__all__ = [
    "COLOURS",
    "DESCRIPTIONS",
    "SHAPES",
    "SPOKEN_SCENES",
    "SampleList",
    "describe",
    "from_rows",
    "load",
    "scene",
    "spoken_scenes",
]

ENTRY_POINTS = "miner_lens.datasets"
SPLITS = ("train", "test")
# The ways to ask of each data set, the default first, and what loads it.
_DATA_SETS = {
    "easy-vqa": (easy_vqa.ASKS, easy_vqa.load),
    "digits": (digits.ASKS, digits.load),
    "spoken-scenes": (spoken.ASKS, spoken.load),
    "text-domains": (text_domains.ASKS, text_domains.load),
}


@overload
def load(
    name: str,
    split: str | None = None,
    limit: int | None = None,
    ask: str | None = None,
    path: str | PathLike[str] | None = None,
    streaming: Literal[False] = False,
) -> SampleList | Rows: ...


@overload
def load(
    name: str,
    split: str | None = None,
    limit: int | None = None,
    ask: str | None = None,
    path: str | PathLike[str] | None = None,
    streaming: bool = False,
) -> SampleList | Rows | RowStream: ...


def load(
    name: str,
    split: str | None = None,
    limit: int | None = None,
    ask: str | None = None,
    path: str | PathLike[str] | None = None,
    streaming: bool = False,
) -> SampleList | Rows | RowStream:
    """Load a data set by name, as a sequence of samples.

    `easy-vqa` (Zhou 2019) asks about images of one coloured shape: 38,575 training and
    9,673 test questions with 13 answers. It comes with the package `easy-vqa`
    (`pip install miner-lens[demo]`).

    `digits` (Alpaydin and Kaynak 1998) asks about images of one handwritten digit: its value,
    whether it is even or odd, greater or less than another; 5,055 training and 1,986 test
    questions with 12 answers, one word each. The file goes on writer by writer: rows 0 to 1,286
    are the training images, rows 1,287 to 1,796, the last four blocks of a writer, the test
    images. From a question alone, yes and no are equally likely. It comes with scikit-learn
    (`pip install miner-lens[demo]`).

    `spoken-scenes` asks about a spoken description of one coloured shape: 480 test questions
    with 18 answers, about 240 clips, spoken by espeak-ng in voices that the organism `speech`
    has never heard. It ships with this package; hearing it needs `miner-lens[audio]`.

    `text-domains` is no questions but text: `code`, `prose`, `licences` and `arithmetic`, at most
    320 training and 80 test passages of each, from what every Python installation has. Each is a
    prompt of 200 to 1,000 characters, the user's turn, with the continuation that was held out
    as its answer; `label` is the domain. The answer begins with its space, so that

        text = sample.messages[0]["content"] + sample.answers[0]

    is the whole passage. For perplexity, tokenize this text without a chat template,
    and score the tokens after those of the prompt: the cut is between two tokens. Through a chat
    model (`ml.run`), the prompt is read in the user's turn, with no instruction that would be of
    another domain. A document is in one split only, and no long paragraph is in two passages. The
    list is the same wherever Python and the wheels of the packages are the same.

    None of these needs a network. The papers' data sets come through Hugging Face `datasets`, from
    the hub or from the folder in which they are published, with the published prompts; their media
    are opened when a sample is asked. They are `textvqa`, `coco_caption`, `mmlu`, `msvd_qa`,
    `librispeech`, `vocalsound` (MINER), `vqav2`, `docvqa`, `pmc_vqa`, `lingoqa` and `rs_vqa`
    (MMNeuron); see the data page. Each names the metrics by which `ml.evaluate` measures answers.

    Other packages add data sets in the entry-point group `miner_lens.datasets`: functions of
    `split`, `limit` and `path`, by keyword, that return samples.

    Args:
        name: The data set, such as `"easy-vqa"`.
        split: Such as `"train"`, `"validation"` or `"test"`; None: the one that papers report, the
            test split, or validation where answers of the test split are not public.
        limit: Load so many samples at most: a seeded draw, always the same, in file order,
            in which a smaller limit's questions are among those of a larger one.
        ask: What a question is asked about. easy-vqa and digits: the `"image"` (the default), a
            one-sentence description of the same image (`"text"`), or `"both"`, one after the
            other. easy-vqa also: the same description spoken (`"audio"`), or the image, with the
            question spoken (`"voice"`). spoken-scenes: the spoken description (`"audio"`, the
            default), the same in writing (`"text"`), `"both"`, one after the other, or the spoken
            description with the question spoken too (`"voice"`). text-domains: one domain, such as
            `"code"`, or all of them in turn (`"all"`, the default). Others: nothing.
        path: The folder of one of the papers' data sets; None: from the hub.
        streaming: Whether to read from the hub row by row, nothing of it on disk; `limit` then
            takes the first rows.

    Raises:
        ValueError: The name, split or way of asking is unknown, the limit is negative, a data set
            is not on the hub or takes no folder, or a folder is malformed.
        ImportError: The package that carries or reads the data is missing.
        FileNotFoundError: There is no such folder, or something is missing in it. text-domains:
            this Python has no source of its standard library.

    Example:
        >>> sample = load("easy-vqa", limit=1, ask="text")[0]
        >>> sample.messages[0]["role"]
        'user'
    """
    if limit is not None and limit < 0:
        raise ValueError(f"limit is {limit}; give a number of samples, or None for all of them.")
    own, of_papers = name.replace("_", "-"), name.replace("-", "_")
    if own in _DATA_SETS:
        return _load_own(own, split, limit, ask, path, streaming)
    if ask is not None:
        raise ValueError(f"{name} can be asked in one way only; leave out ask={ask!r}.")
    if of_papers in PUBLISHED:
        return published.load(of_papers, split, limit, path, streaming)
    installed = {entry.name: entry for entry in entry_points(group=ENTRY_POINTS)}
    check_known("data set", name, dict.fromkeys([*_DATA_SETS, *PUBLISHED, *installed]))
    theirs: Rows = installed[name].load()(split=split, limit=limit, path=path)
    return theirs


def _load_own(
    name: str,
    split: str | None,
    limit: int | None,
    ask: str | None,
    path: str | PathLike[str] | None,
    streaming: bool,
) -> SampleList:
    if path is not None or streaming:
        raise ValueError(f"{name} comes with a package; leave out path and streaming.")
    asks, loader = _DATA_SETS[name]
    ask = next(iter(asks)) if ask is None else ask
    split = "test" if split is None else split
    check_known("split", split, SPLITS)
    check_known("ask", ask, asks)
    return loader(split, ask, limit)

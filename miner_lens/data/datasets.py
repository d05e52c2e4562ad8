"""Data sets by name, as lists of samples, ready to be mined."""

from __future__ import annotations

from miner_lens.data import digits, easy_vqa, text_domains
from miner_lens.data import spoken_scenes as spoken
from miner_lens.data.easy_vqa import COLOURS, DESCRIPTIONS, SHAPES, describe, scene
from miner_lens.data.rows import from_rows
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

SPLITS = ("train", "test")
# The ways to ask of each data set, the default first, and what loads it.
_DATA_SETS = {
    "easy-vqa": (easy_vqa.ASKS, easy_vqa.load),
    "digits": (digits.ASKS, digits.load),
    "spoken-scenes": (spoken.ASKS, spoken.load),
    "text-domains": (text_domains.ASKS, text_domains.load),
}


def load(
    name: str, split: str = "test", limit: int | None = None, ask: str | None = None
) -> SampleList:
    """Load a data set by name, as a list of samples.

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

    None of them needs a network.

    Args:
        name: The data set: `"easy-vqa"`, `"digits"`, `"spoken-scenes"` or `"text-domains"`.
        split: `"train"` or `"test"`; of spoken-scenes there is only the test split.
        limit: Load so many samples at most: a seeded draw, always the same, in file order,
            in which a smaller limit's questions are among those of a larger one.
        ask: What a question is asked about. easy-vqa and digits: the `"image"` (the default), a
            one-sentence description of the same image (`"text"`), or `"both"`, one after the
            other. spoken-scenes: the spoken description (`"audio"`, the default), the same
            in writing (`"text"`), `"both"`, one after the other, or the spoken description
            with the question spoken too (`"voice"`). text-domains: one domain, such as
            `"code"`, or all of them in turn (`"all"`, the default).

    Raises:
        ValueError: The name, split or way of asking is unknown, or the limit is negative.
        ImportError: The package that carries or reads the data is missing.
        FileNotFoundError: text-domains: this Python has no source of its standard library.

    Example:
        >>> sample = load("easy-vqa", limit=1, ask="text")[0]
        >>> sample.messages[0]["role"]
        'user'
    """
    name = name.replace("_", "-")
    check_known("data set", name, _DATA_SETS)
    asks, loader = _DATA_SETS[name]
    ask = next(iter(asks)) if ask is None else ask
    check_known("split", split, SPLITS)
    check_known("ask", ask, asks)
    if limit is not None and limit < 0:
        raise ValueError(f"limit is {limit}; give a number of samples, or None for all of them.")
    return loader(split, ask, limit)

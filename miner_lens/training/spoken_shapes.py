"""easy-VQA spoken with espeak-ng: what `smol-omni` hears, and the clips that ship.

`python -m miner_lens.training.spoken_shapes` writes `spoken-easy-vqa`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import random
import zipfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import easy_vqa
import numpy as np
import torch
from torch import Tensor

from miner_lens import files
from miner_lens.data.easy_vqa import COLOURS, DESCRIPTIONS, SHAPES, SPOKEN
from miner_lens.training import speak
from miner_lens.training.speech_clips import SHARD, WORDS, heard, make_extractor

VOICES = 2  # in which each question of the clips that ship is asked
KIND = "SpokenShapes"


def descriptions() -> list[str]:
    """All descriptions that there are."""
    every = itertools.product(DESCRIPTIONS, COLOURS, SHAPES)
    return [wording.format(colour=colour, shape=shape) for wording, colour, shape in every]


def questions() -> list[str]:
    """All question forms, which are the same in both splits."""
    forms, _, _ = easy_vqa.get_train_questions()
    return sorted(set(forms))


def vocabulary() -> list[str]:
    """All words that are spoken."""
    spoken = [*descriptions(), *questions()]
    return sorted({word for text in spoken for word in WORDS.findall(text)})


class Spoken(NamedTuple):
    """Sentences, as the tower takes them, and what is said in each."""

    mels: Tensor  # [clip, mel, frame], half precision
    frames: Tensor  # [clip], how many are sound
    parts: Tensor  # [clip, token], numbers of parts of words, the highest where none is said
    texts: list[str]


class Shard(NamedTuple):
    """Clips that one process speaks."""

    number: int
    clips: int
    split: str
    asks: bool  # questions rather than descriptions
    seed: int
    known: dict[str, list[int]]
    file: Path


def record_shard(shard: Shard) -> None:
    """Speak so many descriptions or questions in a split's voices, and write the file."""
    torch.set_num_threads(1)
    name = f"easy-vqa {shard.seed} {shard.split} {shard.asks} {shard.number}"
    rng, extractor = random.Random(name), make_extractor()
    train = shard.split == "train"
    variants = (*([""] if train else []), *speak.VARIANTS[shard.split])
    choice = questions() if shard.asks else descriptions()
    made, texts = [], []
    for _ in range(shard.clips):
        texts.append(rng.choice(choice))
        warp = rng.uniform(0.9, 1.1) if train else 1.0
        manner = speak.draw_manner(variants, rng)
        recording = speak.record(texts[-1], manner, rng.getrandbits(32), warp)
        made.append(heard(recording, extractor, shard.known))
    mels, frames, parts = zip(*made, strict=True)
    arrays = {
        "mels": torch.from_numpy(np.stack(mels)),
        "frames": torch.tensor(frames),
        "parts": torch.from_numpy(np.stack(parts)),
    }
    files.write(shard.file, KIND, arrays, {"texts": texts})


def recorded(
    split: str,
    described: int,
    asked: int,
    seed: int,
    known: dict[str, list[int]],
    folder: Path,
) -> Spoken:
    """So many clips of either kind in a split's voices, kept in files of the folder.

    A fresh process for each shard, so that nothing that espeak-ng remembers makes the result
    depend on how many work at once. Shards that are there already are not spoken again.

    Args:
        split: Whose voices: a key of `speak.VARIANTS`.
        described: How many descriptions.
        asked: How many questions.
        seed: Of all that is drawn.
        known: Numbers of each word's parts, as `speech_clips.heard` takes them.
        folder: Where the files are kept.
    """
    shards = []
    for asks, total in ((False, described), (True, asked)):
        for first in range(0, total, SHARD):
            clips = min(SHARD, total - first)
            what = f"{'asked' if asks else 'described'}-{first}-{clips}"
            file = folder / f"spoken-{split}-{seed}-{what}.safetensors"
            shards.append(Shard(first, clips, split, asks, seed, known, file))
    missing = [shard for shard in shards if not shard.file.exists()]
    if missing:
        with multiprocessing.get_context("spawn").Pool(maxtasksperchild=1) as pool:
            pool.map(record_shard, missing, chunksize=1)
    read = [files.read(shard.file, KIND) for shard in shards]
    whole = {name: torch.cat([arrays[name] for arrays, _ in read]) for name in read[0][0]}
    texts = itertools.chain(*(kept["texts"] for _, kept in read))
    return Spoken(whole["mels"], whole["frames"], whole["parts"], list(texts))


def write(file: Path, seed: int = 0) -> None:
    """Speak all descriptions, and all questions in VOICES voices, in those of the test split.

    Args:
        file: A zip file of sounds and `index.jsonl`, which has a line for each.
        seed: Of everything drawn.
    """
    rng = random.Random(f"easy-vqa test {seed}")
    lines = []
    with zipfile.ZipFile(file, "w") as archive:
        for number, text in enumerate([*descriptions(), *questions() * VOICES]):
            manner = speak.draw_manner(speak.VARIANTS["test"], rng)
            recording = speak.record(text, manner, rng.getrandbits(32))
            name = f"{number:03}.ogg"
            archive.writestr(zipfile.ZipInfo(name), speak.encode(recording.samples, number + 1))
            lines.append(json.dumps({"clip": name, "text": text, **asdict(recording.manner)}))
        index = zipfile.ZipInfo("index.jsonl")
        archive.writestr(index, "\n".join(lines) + "\n", zipfile.ZIP_DEFLATED)


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the clips that ship, or others."""
    parser = argparse.ArgumentParser(description="Speak easy-VQA with espeak-ng.")
    parser.add_argument("--out", type=Path, default=SPOKEN, help="the file to write")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    write(options.out, options.seed)


if __name__ == "__main__":
    main()

"""What the organism `speech` is taught with: its processor, and clips as its tower takes them."""

from __future__ import annotations

import itertools
import multiprocessing
import random
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import Qwen2AudioProcessor, WhisperFeatureExtractor

from miner_lens.training import speak
from miner_lens.training.training import make_tokenizer

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|AUDIO|>",
    "<|audio_bos|>",
    "<|audio_eos|>",
)
SECONDS, MELS = 4, 80
# Widths of the decoder and the tower, and the training clips of either kind.
HIDDEN, WIDTH = 128, 96
DESCRIBED, ASKED = 9_000, 3_000
FRAMES = SECONDS * 100
FRAMES_PER_TOKEN = 4
SHARD = 1000
WORDS = re.compile("[a-z]+")
ALL_VALUES = tuple(itertools.chain(*speak.VALUES.values()))
SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"


def spoken_texts() -> list[str]:
    """All descriptions and questions that there are."""
    texts = [w.format(**s._asdict()) for w in speak.DESCRIPTIONS for s in speak.SCENES]
    return texts + questions()


def questions() -> list[str]:
    """All questions that there are."""
    asked = list(itertools.chain(*speak.OPEN_QUESTIONS.values()))
    for attribute, values in speak.VALUES.items():
        asked += [w.format(value=v) for w in speak.CLOSED_QUESTIONS[attribute] for v in values]
    return asked


def vocabulary() -> list[str]:
    """All words that are spoken."""
    return sorted({word for text in spoken_texts() for word in WORDS.findall(text)})


def make_extractor() -> WhisperFeatureExtractor:
    """Log mel spectra, a frame each 10 ms."""
    return WhisperFeatureExtractor(  # type: ignore[no-untyped-call]
        feature_size=MELS, chunk_length=SECONDS
    )


def make_processor() -> Qwen2AudioProcessor:
    """A Qwen2-Audio processor for sounds of at most SECONDS, with the real one's template."""
    texts = [f"{SYSTEM}<|im_start|>user\nAudio {n}: \n" for n in (1, 2)] * 500
    values = itertools.chain(("yes", "no"), *speak.VALUES.values())
    texts += [f"assistant\n{word}" for word in values] * 50
    texts += [f"x {word}" for word in vocabulary()] * 50 + questions() * 20 + spoken_texts()
    return Qwen2AudioProcessor(  # type: ignore[no-untyped-call]
        make_extractor(),
        make_tokenizer(texts, SPECIAL_TOKENS, vocab_size=640),
    )


class Clips(NamedTuple):
    """Spoken sentences, as the tower takes them, and what is said in each."""

    mels: Tensor  # [clip, mel, frame], half precision
    frames: Tensor  # [clip], how many are sound
    words: Tensor  # [clip, token], indices into the vocabulary, its length where none is said
    scenes: list[speak.Scene | None]  # None where a question is spoken
    texts: list[str]


def heard(
    recording: speak.Recording,
    extractor: WhisperFeatureExtractor,
    known: Mapping[str, Sequence[int]],
) -> tuple[np.ndarray, int, np.ndarray]:
    """What Clips holds of a recording: its spectrum, its frames, and what each token says.

    Args:
        recording: The sentence.
        extractor: What `make_extractor` makes.
        known: Numbers of each word's parts, which share its time; no number is left out.
    """
    features = extractor(recording.samples, sampling_rate=speak.RATE, return_attention_mask=True)
    silence = 1 + max(itertools.chain(*known.values()))
    label = np.full(FRAMES // FRAMES_PER_TOKEN, silence, dtype=np.uint8)
    centers = (np.arange(len(label)) + 0.5) * FRAMES_PER_TOKEN / 100
    for word, start, end in recording.words:
        edges = np.linspace(start, end, len(known[word]) + 1)
        for part, (first, last) in zip(known[word], itertools.pairwise(edges), strict=True):
            label[(centers >= first) & (centers < last)] = part
    mel = np.asarray(features.input_features[0], dtype=np.float16)
    return mel, int(np.sum(features.attention_mask[0])), label


def record_shard(task: tuple[int, int, str, bool, int]) -> tuple[Any, ...]:
    """What Clips holds, as arrays: so many descriptions or questions in a split's voices."""
    number, clips, split, asks, seed = task
    torch.set_num_threads(1)
    rng = random.Random(f"{seed} {split} {asks} {number}")
    extractor = make_extractor()
    spoken_of = [scene for scene in speak.SCENES if not scene.is_unheard]
    known = {word: [place] for place, word in enumerate(vocabulary())}
    variants = ("", *speak.VARIANTS[split]) if split == "train" else speak.VARIANTS[split]
    mels, frames, labels, scenes, texts = [], [], [], [], []
    for _ in range(clips):
        scene = rng.choice(spoken_of)
        text = rng.choice(speak.DESCRIPTIONS).format(**scene._asdict())
        if asks:
            text = speak.ask_any(scene, rng).text
        warp = rng.uniform(0.9, 1.1) if split == "train" else 1.0
        manner = speak.draw_manner(variants, rng)
        recording = speak.record(text, manner, rng.getrandbits(32), warp)
        mel, length, label = heard(recording, extractor, known)
        mels.append(mel)
        frames.append(length)
        labels.append(label)
        scenes.append(None if asks else scene)
        texts.append(text)
    return np.stack(mels), np.array(frames), np.stack(labels), scenes, texts


def record(split: str, descriptions: int, asked: int, seed: int) -> Clips:
    """So many clips of either kind in a split's voices.

    A fresh process for each shard, so that nothing that espeak-ng remembers makes the result
    depend on how many work at once.
    """
    tasks = [
        (first, min(SHARD, total - first), split, asks, seed)
        for asks, total in ((False, descriptions), (True, asked))
        for first in range(0, total, SHARD)
    ]
    with multiprocessing.get_context("spawn").Pool(maxtasksperchild=1) as pool:
        shards = pool.map(record_shard, tasks, chunksize=1)
    mels, frames, words, scenes, texts = zip(*shards, strict=True)
    return Clips(
        torch.from_numpy(np.concatenate(mels)),
        torch.from_numpy(np.concatenate(frames)),
        torch.from_numpy(np.concatenate(words)),
        list(itertools.chain(*scenes)),
        list(itertools.chain(*texts)),
    )


def token_counts(frames: Tensor) -> Tensor:
    """How many tokens so many frames become."""
    return ((frames - 1) // 2 - 1) // 2 + 1

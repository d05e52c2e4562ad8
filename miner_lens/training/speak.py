"""Speak scenes with espeak-ng: `python -m miner_lens.training.speak` writes `spoken-scenes`."""

from __future__ import annotations

import argparse
import ctypes
import io
import itertools
import json
import random
import zipfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import soundfile
import soxr

from miner_lens import organisms
from miner_lens.training.ogg import with_serial

VALUES = {
    "size": ("tiny", "small", "large", "huge"),
    "color": ("red", "green", "blue", "black", "white", "yellow", "brown", "purple"),
    "shape": ("circle", "square", "triangle", "star"),
}
DESCRIPTIONS = (
    "a {size} {color} {shape}.",
    "there is a {size} {color} {shape}.",
    "i see a {color} {shape} and it is {size}.",
    "the {shape} is {size} and {color}.",
    "here we have a {size} {shape} in {color}.",
    "this {color} {shape} is {size}.",
    "look at the {size} {shape}, it is {color}.",
    "one {size} {color} {shape} and nothing else.",
    "a {shape} that is {color} and {size}.",
    "somebody drew a {size} {color} {shape}.",
    "the picture shows a {size} {color} {shape}.",
    "{size} and {color} is the {shape}.",
)
OPEN_QUESTIONS = {
    "size": ("what size is it?", "what is its size?", "how big is it?", "how big is the shape?"),
    "color": ("what color is it?", "what is its color?", "which color does it have?"),
    "shape": ("what shape is it?", "what is its shape?", "which shape is there?"),
}
CLOSED_QUESTIONS = {
    "size": ("is it {value}?", "is the shape {value}?", "does it look {value}?"),
    "color": ("is it {value}?", "is the shape {value}?", "is its color {value}?"),
    "shape": ("is it a {value}?", "is there a {value}?", "is the shape a {value}?"),
}

# espeak-ng's English, but for en-us-nyc, which does not say "huge".
ACCENTS = (
    "en",
    "en-us",
    "en-gb-scotland",
    "en-gb-x-gbclan",
    "en-gb-x-gbcwmd",
    "en-gb-x-rp",
    "en-029",
)
# The variants of espeak-ng 1.51, by file name. Left out are those that whisper (caleb, whisper,
# whisperf), those that are an effect laid over a voice (Demonic, UniRobot, anikaRobot, announcer,
# kaukovalta, robosoft 1 to 8) and a test of speed (fast). Variants that share more than half of
# their settings are in the same group.
VARIANTS = {
    "train": (
        *("Alex", "Alicia", "Andy", "AnxiousAndy", "Diogo", "Henrique", "Hugo", "Jacky", "Lee"),
        *("Marco", "Mario", "Michael", "Mike", "Mr serious", "Nguyen", "RicishayMax"),
        *("RicishayMax2", "RicishayMax3", "Storm", "Tweaky", "adam", "anika", "antonio", "aunty"),
        *("benjamin", "croak", "ed", "f1", "f3", "f4", "grandpa", "gustave", "iven", "iven2"),
        *("iven3", "iven4", "john", "klatt", "klatt2", "klatt3", "klatt4", "klatt5", "klatt6"),
        *("m1", "m2", "m3", "m5", "m6", "m8", "marcelo", "max", "michel", "miguel", "norbert"),
        *("paul", "pedro", "quincy", "robert", "shelby"),
    ),
    "check": ("Annie", "Denis", "boris", "f2", "linda", "m4", "rob", "victor"),
    "test": (
        *("Andrea", "Gene", "Gene2", "belinda", "david", "edward", "edward2", "f5", "grandma"),
        *("m7", "pablo", "sandro", "steph", "steph2", "steph3", "travis", "zac"),
    ),
}
RATE, LONGEST = 16_000, 3.9
CLOSEST_NOISE, NO_NOISE = 6.0, 30.0
SHIPPED = Path(organisms.__file__).with_name("spoken-scenes.zip")
_EVENT_WORD, _EVENT_END = 1, 5


class Scene(NamedTuple):
    """What there is to be spoken of; the fields are the keys of VALUES."""

    size: str
    color: str
    shape: str

    @property
    def is_unheard(self) -> bool:
        """Whether no training clip describes this scene; so it is with one scene in eight."""
        places = [VALUES[name].index(value) for name, value in self._asdict().items()]
        return sum(places) % 8 == 0


SCENES = tuple(itertools.starmap(Scene, itertools.product(*VALUES.values())))


@dataclass(frozen=True)
class Manner:
    """How a sentence is spoken.

    Attributes:
        voice: Accent and variant, as espeak-ng takes them.
        speed: Words per minute.
        pitch: espeak-ng's pitch, 0 to 99.
        noise: What is heard behind the voice: `"none"`, `"white"` or `"pink"`.
        snr: How much louder the voice is than the noise, in dB.
        peak: The largest sample.
    """

    voice: str
    speed: int
    pitch: int
    noise: str
    snr: float | None
    peak: float


class Recording(NamedTuple):
    """A spoken sentence: samples at RATE, and each word with its start and end in seconds."""

    samples: np.ndarray  # [time]
    words: tuple[tuple[str, float, float], ...]
    manner: Manner


def draw_manner(variants: Sequence[str], rng: random.Random) -> Manner:
    """A manner at random, with one of the variants, or none where that is `""`."""
    accent, variant = rng.choice(ACCENTS), rng.choice(variants)
    noise = rng.choice(("none", "white", "white", "pink", "pink"))
    snr = None if noise == "none" else round(rng.uniform(CLOSEST_NOISE, NO_NOISE), 1)
    return Manner(
        voice=f"{accent}+{variant}" if variant else accent,
        speed=rng.randint(140, 210),
        pitch=rng.randint(25, 75),
        noise=noise,
        snr=snr,
        peak=round(rng.uniform(0.15, 0.85), 2),
    )


class _Event(ctypes.Structure):
    _fields_ = (
        ("type", ctypes.c_int),
        ("unique_identifier", ctypes.c_uint),
        ("text_position", ctypes.c_int),
        ("length", ctypes.c_int),
        ("audio_position", ctypes.c_int),
        ("sample", ctypes.c_int),
        ("user_data", ctypes.c_void_p),
        ("id", ctypes.c_char * 8),
    )


class Synthesizer:
    """libespeak-ng. It keeps settings in global variables, so there is one in a process.

    Raises:
        OSError: espeak-ng is not installed.
    """

    def __init__(self) -> None:
        try:
            self._library = ctypes.CDLL("libespeak-ng.so.1")
        except OSError as error:
            raise OSError("Speaking needs espeak-ng: apt-get install espeak-ng") from error
        self.rate = self._library.espeak_Initialize(2, 0, None, 0)
        callback = ctypes.CFUNCTYPE(
            ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.POINTER(_Event)
        )
        self._callback = callback(self._collect)
        self._library.espeak_SetSynthCallback(self._callback)
        self._pieces: list[np.ndarray] = []
        self._events: list[tuple[int, int, int, int]] = []

    def _collect(self, wave: Any, length: int, events: Any) -> int:
        if wave and length:
            self._pieces.append(np.ctypeslib.as_array(wave, (length,)).copy())
        for event in itertools.takewhile(lambda event: event.type, events):
            # The first character of a text is number 1.
            start = event.text_position - 1
            self._events.append((event.type, start, event.length, event.sample))
        return 0

    def say(
        self, text: str, voice: str, speed: int, pitch: int
    ) -> tuple[np.ndarray, list[tuple[str, float, float]]]:
        """Samples [time] at `self.rate`, and each word with its start and end in seconds."""
        self._pieces.clear()
        self._events.clear()
        if self._library.espeak_SetVoiceByName(voice.encode()):
            raise ValueError(f"espeak-ng has no voice {voice!r}; `espeak-ng --voices` lists them.")
        for parameter, value in ((1, speed), (3, pitch)):
            self._library.espeak_SetParameter(parameter, value, 0)
        encoded = text.encode()
        self._library.espeak_Synth(encoded, len(encoded) + 1, 0, 1, 0, 1, None, None)
        marks = [event for event in self._events if event[0] in (_EVENT_WORD, _EVENT_END)]
        words = [
            (text[start : start + length].strip(".,?"), first / self.rate, last / self.rate)
            for (kind, start, length, first), (*_, last) in itertools.pairwise(marks)
            if kind == _EVENT_WORD and length
        ]
        return np.concatenate(self._pieces), words


@cache
def synthesizer() -> Synthesizer:
    """This process's synthesizer."""
    return Synthesizer()


def record(text: str, manner: Manner, seed: int, warp: float = 1.0) -> Recording:
    """Speak a sentence, put noise behind it, and cut it to what the model hears.

    espeak-ng's flutter goes on from one sentence to the next. So a process that speaks the same
    sentences in the same order says the same, but the same sentence again differs a little.

    Args:
        text: The sentence.
        manner: How it is spoken; faster, if it would last longer than LONGEST.
        seed: Of the noise and of the pauses before and after.
        warp: Plays the voice so many times as fast, and higher, as a tape would.
    """
    generator = np.random.default_rng(seed)
    while True:
        spoken, words = synthesizer().say(text, manner.voice, manner.speed, manner.pitch)
        voice = soxr.resample(spoken / 32768, synthesizer().rate * warp, RATE, quality="HQ")
        loud = np.flatnonzero(np.abs(voice) > 0.01 * np.abs(voice).max())
        first, last = loud[0], loud[-1] + 1
        before, after = generator.integers(RATE // 100, RATE // 5, 2)
        if before + last - first + after <= LONGEST * RATE:
            break
        manner = replace(manner, speed=round(manner.speed * 1.15))
    samples = np.concatenate([np.zeros(before), voice[first:last], np.zeros(after)])
    if manner.snr is not None:
        noise = _noise(manner.noise, len(samples), generator)
        power = np.mean(voice[first:last] ** 2) / np.mean(noise**2)
        samples += noise * np.sqrt(power) * 10 ** (-manner.snr / 20)
    samples *= manner.peak / np.abs(samples).max()
    shift, end = (before - first) / RATE, (before + last - first) / RATE
    times = ((w, start / warp + shift, min(stop / warp + shift, end)) for w, start, stop in words)
    return Recording(samples.astype(np.float32), tuple(times), manner)


def _noise(kind: str, length: int, generator: np.random.Generator) -> np.ndarray:
    white = generator.standard_normal(length)
    if kind == "white":
        return white
    spectrum = np.fft.rfft(white)
    return np.fft.irfft(spectrum / np.sqrt(np.arange(len(spectrum)).clip(1)), length)


class Question(NamedTuple):
    """A question about a scene, in words."""

    text: str
    answer: str
    wording: str


def ask_open(scene: Scene, attribute: str, rng: random.Random) -> Question:
    """A question after a size, colour or shape."""
    wording = rng.choice(OPEN_QUESTIONS[attribute])
    return Question(wording, getattr(scene, attribute), wording)


def ask_closed(attribute: str, value: str, answer: str, rng: random.Random) -> Question:
    """A question after one value, to be answered with yes or no."""
    wording = rng.choice(CLOSED_QUESTIONS[attribute])
    return Question(wording.format(value=value), answer, wording)


def ask_any(scene: Scene, rng: random.Random) -> Question:
    """A question as training asks: four in ten open; yes and no as likely, for any value."""
    attribute = rng.choice(tuple(VALUES))
    if rng.random() < 0.4:
        return ask_open(scene, attribute, rng)
    value, answer = getattr(scene, attribute), "yes"
    if rng.random() < 0.5:
        value = rng.choice([other for other in VALUES[attribute] if other != value])
        answer = "no"
    return ask_closed(attribute, value, answer, rng)


def encode(samples: np.ndarray, serial: int | None) -> bytes:
    """An Ogg file with Opus at 20 kbit/s, under a serial number, or without one a FLAC file."""
    file = io.BytesIO()
    if serial is None:
        soundfile.write(file, samples, RATE, format="FLAC")
        return file.getvalue()
    soundfile.write(file, samples, RATE, format="OGG", subtype="OPUS", compression_level=0.96)
    return with_serial(file.getvalue(), serial)


def plan(clips: int, rng: random.Random) -> list[tuple[Scene, Question, Question]]:
    """Scenes, each with a yes/no question and an open one after something else.

    For any value that is asked after, yes and no are as frequent where `clips` is a multiple
    of 48.
    """
    wanted: list[tuple[str, str, str]] = []
    for attribute, values in VALUES.items():
        times = 8 // len(values)
        wanted += itertools.product([attribute], values * times, ("yes", "no"))
    planned = []
    for attribute, value, answer in itertools.islice(itertools.cycle(wanted), clips):
        fits = [s for s in SCENES if (getattr(s, attribute) == value) == (answer == "yes")]
        scene = rng.choice(fits)
        other = rng.choice([name for name in VALUES if name != attribute])
        closed = ask_closed(attribute, value, answer, rng)
        planned.append((scene, closed, ask_open(scene, other, rng)))
    rng.shuffle(planned)
    return planned


def write(
    file: Path, clips: int, split: str = "test", seed: int = 0, lossless: bool = False
) -> None:
    """Write a data set that `miner_lens.data.datasets.spoken_scenes` reads.

    Args:
        file: A zip file of sounds and `index.jsonl`, which has a line for each question.
        clips: How many scenes are described; there are two questions about each.
        split: Whose voices speak: a key of VARIANTS.
        seed: Of everything drawn.
        lossless: Whether the sounds are FLAC: larger, sooner made, and just what was spoken.
    """
    rng = random.Random(seed)
    lines = []
    ending = "flac" if lossless else "ogg"
    with zipfile.ZipFile(file, "w") as archive:

        def add(name: str, text: str, manner: Manner) -> Manner:
            recording = record(text, manner, rng.getrandbits(32))
            # A date of its own would make each run's file another.
            member = zipfile.ZipInfo(name)
            serial = None if lossless else len(archive.filelist)
            archive.writestr(member, encode(recording.samples, serial))
            return recording.manner

        for number, (scene, *questions) in enumerate(plan(clips, rng)):
            wording = rng.choice(DESCRIPTIONS)
            description = wording.format(**scene._asdict())
            clip = f"{number:04}.{ending}"
            manner = add(clip, description, draw_manner(VARIANTS[split], rng))
            for which, question in enumerate(questions):
                line = {
                    "clip": clip,
                    **scene._asdict(),
                    "description": description,
                    "wording": wording,
                    "question": question.text,
                    "question_wording": question.wording,
                    "question_clip": f"{number:04}-{which}.{ending}",
                    "answer": question.answer,
                    **asdict(manner),
                }
                add(line["question_clip"], question.text, manner)
                lines.append(json.dumps(line) + "\n")
        index = zipfile.ZipInfo("index.jsonl")
        archive.writestr(index, "".join(lines), zipfile.ZIP_DEFLATED)


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the test set that ships, or another."""
    parser = argparse.ArgumentParser(description="Speak scenes and questions with espeak-ng.")
    parser.add_argument("--out", type=Path, default=SHIPPED, help="the file to write")
    parser.add_argument("--clips", type=int, default=240, help="scenes described, a multiple of 48")
    parser.add_argument("--split", choices=VARIANTS, default="test", help="whose voices speak")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    write(options.out, options.clips, options.split, options.seed)


if __name__ == "__main__":
    main()

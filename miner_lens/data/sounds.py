"""Sounds: files, arrays and decoders, mono and at the rate that the processor wants."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from miner_lens.data.sample import SampleError
from miner_lens.data.sources import describe, locate, open_source, require

# Whisper's features need three hops of 10 ms to give one token after the tower's pooling.
SHORTEST_SOUND = 0.03
# Lossy speech decodes to peaks of up to 1.1 of full scale, and badly clipped noise to 2.6; above
# this, samples are integers that nobody has scaled.
LOUDEST_SOUND = 4.0


def audio_reader(processor: Any) -> Any:
    """Return the part of a processor that makes features of sounds; None if it has none."""
    return getattr(processor, "audio_processor", getattr(processor, "feature_extractor", None))


def sound_rate(processor: Any, call: Mapping[str, Any] | None = None) -> int:
    """Return the samples per second at which a processor wants sounds, as Hugging Face finds it.

    Args:
        processor: A processor that takes sounds.
        call: What it is told of all sounds in the call.
    """
    asked = (call or {}).get("sampling_rate")
    rate: Any = asked or getattr(audio_reader(processor), "sampling_rate", 16_000)
    return int(rate)


def load_sound(
    source: Any, rate: int | None, processor: Any, call: Mapping[str, Any] | None = None
) -> np.ndarray:
    """Read a sound as mono float32 at the rate that the processor wants, clipped to full scale.

    Lossy files overshoot full scale a little when they are decoded, and players clip them too.

    Args:
        source: A path, the bytes of a sound file, a data URI, an array or tensor `[time]` or
            `[time channel]`, or a mapping of `array` and `sampling_rate` or a decoder of
            torchcodec's, as Hugging Face data sets give them. Arrays of floats have 1 as full
            scale; arrays of 8, 16 or 32-bit integers the range of their type.
        rate: Samples per second of an array.
        processor: The processor.
        call: What the processor is told of all sounds in the call.

    Raises:
        SampleError: The sound is unreadable, empty or too short, holds NaN, or holds integers that
            are not scaled.
    """
    if audio_reader(processor) is None:
        raise SampleError("This model's processor has no feature extractor, so it hears no sound.")
    source = locate(source)
    if isinstance(source, Mapping):
        source, rate = source.get("array"), source.get("sampling_rate")
    elif hasattr(source, "get_all_samples"):
        decoded = source.get_all_samples()  # [channel time]
        source, rate = decoded.data.cpu().numpy().T, decoded.sample_rate
    if hasattr(source, "detach"):
        source = source.detach().cpu().numpy()
    if isinstance(source, str | Path | bytes):
        samples, rate = _decode_sound(source)
    elif isinstance(source, np.ndarray):
        samples = _full_scale(source)
    else:
        raise SampleError(
            f"A sound must be a path, bytes or a numpy array, not {type(source).__name__}."
        )
    if rate is None:
        raise SampleError(
            "An array of sound needs its rate: {'type': 'audio', 'audio': array, "
            "'sampling_rate': 16000}."
        )
    if rate <= 0:
        raise SampleError(f"The rate is {rate}; give samples per second, such as 16000.")
    _check_sound(samples, rate)
    samples = samples.clip(-1, 1)
    mono = samples if samples.ndim == 1 else samples.mean(axis=1)
    return np.asarray(_resample(mono, rate, sound_rate(processor, call)), dtype=np.float32)


def _resample(mono: np.ndarray, rate: int, wanted: int) -> np.ndarray:
    if rate == wanted:
        return mono
    require("soxr", "Resampling sound needs soxr", "audio")
    import soxr

    resampled: np.ndarray = soxr.resample(mono, rate, wanted, quality="HQ")
    # As many samples as Hugging Face's own loader makes of it.
    count = math.ceil(len(mono) * wanted / rate)
    return np.pad(resampled, (0, max(0, count - len(resampled))))[:count]


def _decode_sound(source: str | Path | bytes) -> tuple[np.ndarray, int]:
    require("soundfile", "Reading sound files needs soundfile", "audio")
    import soundfile

    try:
        samples, rate = soundfile.read(open_source(source), dtype="float32")
    except (OSError, RuntimeError) as error:
        raise SampleError(f"Cannot read a sound from {describe(source)}: {error}") from error
    return samples, rate


def _full_scale(samples: np.ndarray) -> np.ndarray:
    """Integers as fractions of full scale; unsigned ones are silent in the middle of their range.

    Raises:
        SampleError: The samples are no numbers, or of a type that says nothing of full scale.
    """
    kind, size = samples.dtype.kind, samples.dtype.itemsize
    if kind == "f":
        return samples.astype(np.float32)
    if kind not in "iu" or size > 4:
        raise SampleError(
            f"A sound must be floats up to 1, or integers of 8, 16 or 32 bits, not {samples.dtype}."
        )
    half = 2 ** (8 * size - 1)
    middle = half if kind == "u" else 0
    scaled: np.ndarray = ((samples.astype(np.float64) - middle) / half).astype(np.float32)
    return scaled


def _check_sound(samples: np.ndarray, rate: int) -> None:
    if samples.ndim not in (1, 2) or samples.size == 0:
        raise SampleError(
            f"A sound must be [time] or [time channel] and not empty, not {list(samples.shape)}."
        )
    if samples.ndim == 2 and samples.shape[0] < samples.shape[1]:
        raise SampleError(
            f"A sound must be [time channel], not {list(samples.shape)}: transpose the array."
        )
    if not np.isfinite(samples).all():
        raise SampleError("The sound holds NaN or infinite samples.")
    seconds = len(samples) / rate
    if seconds < SHORTEST_SOUND:
        raise SampleError(f"The sound lasts {seconds:.4f} s; it needs at least {SHORTEST_SOUND} s.")
    peak = float(np.abs(samples).max())
    if peak > LOUDEST_SOUND:
        raise SampleError(
            f"The sound is not scaled: its peak is {peak:.3g}, and full scale is 1. Divide 16-bit "
            "samples by 32768, or pass them as integers."
        )

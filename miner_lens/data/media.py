"""Open the images, videos and sounds of a conversation. Nothing is fetched from a network."""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from miner_lens.data.sample import Message, SampleError

# Whisper's features need three hops of 10 ms to give one token after the tower's pooling.
SHORTEST_SOUND = 0.03
# Lossy speech decodes to peaks of up to 1.1 of full scale, and badly clipped noise to 2.6; above
# this, samples are integers that nobody has scaled.
LOUDEST_SOUND = 4.0


def load_media(messages: Sequence[Message], processor: Any = None) -> list[dict[str, Any]]:
    """Open the media of a conversation.

    Args:
        messages: A conversation. Image paths and bytes become PIL images; a video path becomes its
            frames, sampled as the processor wants them; sounds become mono arrays at the
            processor's rate.
        processor: The processor that will read the result; images need none.

    Raises:
        SampleError: A medium cannot be read, or is of a kind that is not supported.
        ImportError: The package that decodes this kind of file is missing.
    """
    opened = []
    for message in messages:
        given = _given(message) if isinstance(message, Mapping) else {}
        if "role" not in given or "content" not in given:
            raise SampleError(f"A message needs a role and a content, not {message!r:.100}.")
        opened.append({**given, "content": _load_content(given["content"], processor)})
    return opened


def _given(mapping: Mapping[str, Any]) -> dict[str, Any]:
    """A mapping without the keys whose value is None.

    Tables give every part of a message the keys of all parts, and a chat template takes the key
    `image` for an image, whatever its value is.
    """
    return {key: value for key, value in mapping.items() if value is not None}


def _load_content(content: Any, processor: Any) -> Any:
    if isinstance(content, str):
        return content
    if not isinstance(content, Sequence):
        raise SampleError(f"A content must be a string or a list of parts, not {content!r:.100}.")
    return [_load_part(part, processor) for part in content]


def _load_part(part: Any, processor: Any) -> dict[str, Any]:
    given = _given(part) if isinstance(part, Mapping) else {}
    if "type" not in given:
        raise SampleError(f"A part of a message needs a type, not {part!r:.100}.")
    kind = str(given["type"]).removesuffix("_url")
    if kind not in ("image", "video", "audio"):
        return given
    named = (given[key] for key in (kind, f"{kind}_url", "path", "url") if key in given)
    source = next(named, None)
    if isinstance(source, Mapping) and "url" in source:
        source = source["url"]
    if isinstance(source, Mapping) and "bytes" in source:
        # A file as tables store it, {"bytes": ..., "path": ...}, either of them None.
        source = source["bytes"] or source.get("path")
    if isinstance(source, str) and source.startswith(("http://", "https://")):
        raise SampleError(f"Nothing is fetched from a network: download {source} first.")
    if kind == "image":
        return {"type": kind, kind: load_image(source)}
    if kind == "video":
        frames, metadata = load_video(source, processor)
        return {"type": kind, kind: frames, "metadata": metadata}
    return {"type": kind, kind: load_sound(source, given.get("sampling_rate"), processor)}


def load_image(source: Any) -> Image.Image:
    """Open a PIL image, a path or an image file's bytes, as RGB, upright as its EXIF data say."""
    if not isinstance(source, str | Path | bytes | Image.Image):
        raise SampleError(
            f"An image must be a PIL image, a path or bytes, not {type(source).__name__}."
        )
    try:
        if isinstance(source, Image.Image):
            return _upright(source)
        with Image.open(_file(source)) as image:
            return _upright(image)
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise SampleError(f"Cannot read an image from {_what(source)}: {error}") from error


def _upright(image: Image.Image) -> Image.Image:
    """As Hugging Face reads images, whichever way the camera was held."""
    return ImageOps.exif_transpose(image).convert("RGB")


def load_video(source: Any, processor: Any) -> tuple[Any, dict[str, Any]]:
    """Decode a video file with PyAV; frames pass as images do.

    Returns:
        The frames, sampled as the processor wants, and which they are of how many a second, as
        Hugging Face's `VideoMetadata` has it. Of frames that were given nobody knows the rate.
    """
    if isinstance(source, Sequence) and not isinstance(source, str | bytes):
        if not source:
            raise SampleError("A video needs at least one frame.")
        count = len(source)
        known = {"total_num_frames": count, "fps": None, "frames_indices": list(range(count))}
        return [load_image(frame) for frame in source], known
    if not isinstance(source, str | Path):
        raise SampleError(
            f"A video must be a path or a sequence of frames, not {type(source).__name__}."
        )
    _require("av", "Reading video files needs PyAV", "video")
    from transformers import video_utils

    if not Path(source).is_file():
        raise SampleError(f"Cannot read a video from {_what(source)}: there is no such file.")
    reader: Any = getattr(processor, "video_processor", None)
    sampler = reader.sample_frames if getattr(reader, "do_sample_frames", False) else None
    try:
        load: Any = video_utils.load_video
        frames, metadata = load(str(source), backend="pyav", sample_indices_fn=sampler)
    except Exception as error:  # PyAV has one exception class for each of FFmpeg's codes
        raise SampleError(f"Cannot read a video from {_what(source)}: {error}") from error
    return frames, {**metadata, "frames_indices": [int(n) for n in metadata.frames_indices]}


def load_sound(source: Any, rate: int | None, processor: Any) -> np.ndarray:
    """Read a sound as mono float32 at the rate that the processor wants, clipped to full scale.

    Lossy files overshoot full scale a little when they are decoded, and players clip them too.

    Args:
        source: A path, the bytes of a sound file, an array `[time]` or `[time channel]`, or a
            mapping of `array` and `sampling_rate` or a decoder of torchcodec's, as Hugging Face
            data sets give them. Arrays of floats have 1 as full scale; arrays of 8, 16 or 32-bit
            integers the range of their type.
        rate: Samples per second of an array.
        processor: The processor; its feature extractor says rate and longest duration.

    Raises:
        SampleError: The sound is unreadable, empty, too short or too long for the model, holds
            NaN, or holds integers that are not scaled.
    """
    extractor = getattr(processor, "feature_extractor", None)
    if extractor is None:
        raise SampleError("This model's processor has no feature extractor, so it hears no sound.")
    if isinstance(source, Mapping):
        source, rate = source.get("array"), source.get("sampling_rate")
    elif hasattr(source, "get_all_samples"):
        decoded = source.get_all_samples()  # [channel time]
        source, rate = decoded.data.cpu().numpy().T, decoded.sample_rate
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
    _check_sound(samples, rate, extractor.chunk_length)
    samples = samples.clip(-1, 1)
    mono = samples if samples.ndim == 1 else samples.mean(axis=1)
    if rate != extractor.sampling_rate:
        _require("soxr", "Resampling sound needs soxr", "audio")
        import soxr

        mono = soxr.resample(mono, rate, extractor.sampling_rate, quality="HQ")
    resampled: np.ndarray = np.asarray(mono, dtype=np.float32)
    return resampled


def _decode_sound(source: str | Path | bytes) -> tuple[np.ndarray, int]:
    _require("soundfile", "Reading sound files needs soundfile", "audio")
    import soundfile

    try:
        samples, rate = soundfile.read(_file(source), dtype="float32")
    except (OSError, RuntimeError) as error:
        raise SampleError(f"Cannot read a sound from {_what(source)}: {error}") from error
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


def _check_sound(samples: np.ndarray, rate: int, longest: float) -> None:
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
    if seconds > longest:
        raise SampleError(
            f"The sound lasts {seconds:.1f} s; the model hears {longest} s. Cut it into pieces."
        )
    peak = float(np.abs(samples).max())
    if peak > LOUDEST_SOUND:
        raise SampleError(
            f"The sound is not scaled: its peak is {peak:.3g}, and full scale is 1. Divide 16-bit "
            "samples by 32768, or pass them as integers."
        )


def _file(source: str | Path | bytes) -> Any:
    return io.BytesIO(source) if isinstance(source, bytes) else str(source)


def _what(source: str | Path | bytes | Image.Image) -> str:
    return f"{len(source)} bytes" if isinstance(source, bytes) else repr(str(source))


def _require(package: str, need: str, extra: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise ImportError(f"{need}: pip install 'miner-lens[{extra}]'.")

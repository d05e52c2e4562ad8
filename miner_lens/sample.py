"""One example of a data set: a conversation, the answers that count as right, and an id."""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

Message = Mapping[str, Any]


@dataclass(frozen=True)
class Sample:
    """A conversation in Hugging Face chat format, with its accepted answers.

    Any iterable of samples is a data set.

    Attributes:
        messages: Messages as a Hugging Face processor's `apply_chat_template` takes
            them: `{"role": ..., "content": [{"type": "image", "image": ...}, ...]}`.
            An image is a PIL image, a path or the bytes of an image file; a video is a
            path or a sequence of frames.
        answers: The answers that count as right; empty where there is none.
        id: What error messages and tables call this sample.

    Example:
        >>> sample = Sample([{"role": "user", "content": "What is red?"}], ("a colour",), "q1")
        >>> sample.id
        'q1'
    """

    messages: Sequence[Message]
    answers: tuple[str, ...] = ()
    id: str | None = None


class SampleError(ValueError):
    """A sample that cannot be used; `run(..., on_error="skip")` passes over it."""


def load_media(messages: Sequence[Message], processor: Any = None) -> list[dict[str, Any]]:
    """Open the images and videos of a conversation.

    Args:
        messages: A conversation; image paths and bytes become PIL images, a video path becomes
            its frames, sampled as the processor wants them. Nothing is fetched from a network.
        processor: The processor that will read the result; only videos need it.

    Raises:
        SampleError: A medium cannot be read, or is of a kind that is not supported.
    """
    return [
        {**message, "content": _load_content(message["content"], processor)} for message in messages
    ]


def _load_content(content: Any, processor: Any) -> Any:
    if isinstance(content, str):
        return content
    return [_load_part(part, processor) for part in content]


def _load_part(part: Mapping[str, Any], processor: Any) -> dict[str, Any]:
    kind = part.get("type")
    if kind == "image":
        return {"type": "image", "image": _load_image(part.get("image", part.get("path")))}
    if kind == "video":
        return {
            "type": "video",
            "video": _load_video(part.get("video", part.get("path")), processor),
        }
    return dict(part)


def _load_image(source: Any) -> Image.Image:
    """Open a PIL image, a path or an image file's bytes, as RGB."""
    if isinstance(source, Image.Image):
        return source.convert("RGB")
    if not isinstance(source, str | Path | bytes):
        raise SampleError(
            f"An image must be a PIL image, a path or bytes, not {type(source).__name__}."
        )
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError) as error:
        what = f"{len(source)} bytes" if isinstance(source, bytes) else repr(str(source))
        raise SampleError(f"Cannot read an image from {what}: {error}") from error


def _load_video(source: Any, processor: Any) -> Any:
    """Decode a video file with PyAV; frames pass as images do."""
    if isinstance(source, Sequence) and not isinstance(source, str | bytes):
        return [_load_image(frame) for frame in source]
    if not isinstance(source, str | Path):
        raise SampleError(
            f"A video must be a path or a sequence of frames, not {type(source).__name__}."
        )
    if importlib.util.find_spec("av") is None:
        raise ImportError("Reading video files needs PyAV: pip install 'miner-lens[video]'.")
    from transformers import video_utils

    if not Path(source).is_file():
        raise SampleError(f"Cannot read a video from {str(source)!r}: there is no such file.")
    sampler = getattr(getattr(processor, "video_processor", None), "sample_frames", None)
    wanted = sampler if getattr(processor.video_processor, "do_sample_frames", False) else None
    try:
        load: Any = video_utils.load_video
        frames, _ = load(str(source), backend="pyav", sample_indices_fn=wanted)
    except Exception as error:  # PyAV has one exception class for each of FFmpeg's codes
        raise SampleError(f"Cannot read a video from {str(source)!r}: {error}") from error
    return frames

"""Open the images, videos and sounds of a conversation. Nothing is fetched from a network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from miner_lens.data.pictures import load_image as load_image
from miner_lens.data.sample import Message, SampleError
from miner_lens.data.sounds import load_sound as load_sound
from miner_lens.data.videos import load_video as load_video

# What a part may say of its medium, as qwen-vl-utils names it; two have another name at Hugging
# Face.
_PIXELS = ("min_pixels", "max_pixels")
_SIZE = ("resized_height", "resized_width")
_SAMPLING = {"fps": "fps", "sample_fps": "fps", "num_frames": "num_frames", "nframes": "num_frames"}
_SAMPLING |= {"min_frames": "min_frames", "max_frames": "max_frames"}
_UNREAD = ("total_pixels", "video_start", "video_end", "raw_fps")
_KEYS = ("{}", "{}_url", "input_{}", "path", "url", "base64")


def load_media(
    messages: Sequence[Message], processor: Any = None, **processor_kwargs: Any
) -> list[dict[str, Any]]:
    """Open the media of a conversation.

    Args:
        messages: A conversation. Pictures become PIL images; a video file becomes its frames,
            sampled as the processor wants them; sounds become mono arrays at the processor's rate.
        processor: The processor that will read the result; images need none.
        processor_kwargs: What the processor will be told in the call.

    Returns:
        The messages with a part `{"type": "image", "image": image}` for each picture, and the like
        for videos and sounds. A part has `options` where its medium is to be read otherwise than
        the processor reads media; one of a video has its `metadata`.

    Raises:
        SampleError: A medium cannot be read, or is of a kind that is not supported.
        ImportError: The package that decodes this kind of file is missing.
    """
    opened = []
    for message in messages:
        given = _given(message) if isinstance(message, Mapping) else {}
        if "role" not in given or "content" not in given:
            raise SampleError(f"A message needs a role and a content, not {message!r:.100}.")
        content = _load_content(given["content"], processor, processor_kwargs)
        opened.append({**given, "content": content})
    return opened


def _given(mapping: Mapping[str, Any]) -> dict[str, Any]:
    """A mapping without the keys whose value is None.

    Tables give every part of a message the keys of all parts, and a chat template takes the key
    `image` for an image, whatever its value is.
    """
    return {key: value for key, value in mapping.items() if value is not None}


def _load_content(content: Any, processor: Any, told: Mapping[str, Any]) -> Any:
    if isinstance(content, str):
        return content
    if not isinstance(content, Sequence):
        raise SampleError(f"A content must be a string or a list of parts, not {content!r:.100}.")
    return [_load_part(part, processor, told) for part in content]


def _load_part(part: Any, processor: Any, told: Mapping[str, Any]) -> dict[str, Any]:
    given = _given(part) if isinstance(part, Mapping) else {}
    if "type" not in given:
        raise SampleError(f"A part of a message needs a type, not {part!r:.100}.")
    kind = str(given["type"]).removeprefix("input_").removesuffix("_url")
    if kind not in ("image", "video", "audio"):
        return given
    names = [key.format(kind) for key in _KEYS]
    source = next((given[name] for name in names if name in given), None)
    for name in _UNREAD:
        if name in given:
            raise SampleError(
                f"{name!r} of a {kind} is not supported: cut or resize the {kind} first."
            )
    if kind == "audio":
        call = told_of(processor, "audio", told)
        return {"type": kind, kind: load_sound(source, given.get("sampling_rate"), processor, call)}
    options = _pixel_options(processor, kind, given)
    size = options.pop("size", None)
    opened: dict[str, Any] = {"type": kind}
    if kind == "image":
        opened[kind] = load_image(source, processor)
    else:
        call = told_of(processor, "video", told)
        sampling = {
            _SAMPLING[name]: _number(name, given[name]) for name in _SAMPLING if name in given
        }
        opened[kind], opened["metadata"] = load_video(source, processor, sampling, call)
        if "fps" in sampling:
            # Frames were taken at that rate, and fewer of them are at a lower one.
            frames, metadata = len(opened[kind]), opened["metadata"]
            share = 1 if "video_backend" in metadata else frames / metadata["total_num_frames"]
            options["fps"] = sampling["fps"] * share
    if size is not None:
        opened[kind] = _resize(opened[kind], size)
    return opened | ({"options": options} if options else {})


def told_of(processor: Any, kind: str, told: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a processor tells its part for a kind of media, as Hugging Face merges it.

    Args:
        processor: A processor.
        kind: `"image"`, `"video"` or `"audio"`.
        told: What the processor is told in the call.
    """
    group = "audio_kwargs" if kind == "audio" else f"{kind}s_kwargs"
    declared = getattr(getattr(processor, "valid_processor_kwargs", None), "__annotations__", {})
    reader = getattr(processor, f"{kind}_processor", None)
    takes = {
        *getattr(declared.get(group), "__annotations__", {}),
        *getattr(getattr(reader, "valid_kwargs", None), "__annotations__", {}),
    }
    flat = {name: value for name, value in told.items() if name in takes}
    return {**getattr(processor, group, {}), **told.get(group, {}), **flat}


def _number(name: str, value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = 0
    if not 0 < number < float("inf"):
        raise SampleError(f"{name!r} must be a number above 0, not {value!r:.100}.")
    return number if number % 1 or name in ("fps", "sample_fps") else int(number)


def _pixel_options(processor: Any, kind: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a part says of the size of its pictures, in the processor's words."""
    options = {
        name: int(_number(name, given[name])) for name in (*_PIXELS, *_SIZE) if name in given
    }
    if not options:
        return {}
    reader: Any = getattr(processor, f"{kind}_processor", None)
    takes = getattr(getattr(reader, "valid_kwargs", None), "__annotations__", {})
    if not takes.keys() >= set(_PIXELS):
        raise SampleError(
            f"This model's {kind} processor has no limits of pixels, so {', '.join(options)} "
            f"would do nothing: drop it, or resize the {kind}."
        )
    height, width = (options.get(name) for name in _SIZE)
    if height is None and width is None:
        return options
    if height is None or width is None:
        raise SampleError("resized_height and resized_width go together: give both.")
    side = reader.patch_size * reader.merge_size
    height, width = (max(side, round(length / side) * side) for length in (height, width))
    # So that the processor leaves it at this size.
    return {"size": (width, height), "min_pixels": height * width, "max_pixels": height * width}


def _resize(medium: Any, size: tuple[int, int]) -> Any:
    if isinstance(medium, Image.Image):
        return medium.resize(size, Image.Resampling.BICUBIC)
    if isinstance(medium, np.ndarray):
        return np.stack([_resize(Image.fromarray(frame), size) for frame in medium])
    return [_resize(frame, size) for frame in medium]

"""Videos: files and frames, sampled as the processor samples them."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from miner_lens.data.pictures import load_image
from miner_lens.data.sample import SampleError
from miner_lens.data.sources import describe, locate, open_source, require

# What a video processor takes of a call before it samples frames.
_BEFORE_SAMPLING = (
    "input_data_format",
    "do_convert_rgb",
    "do_sample_frames",
    "device",
    "video_metadata",
)
_Choose = Callable[[Any], Sequence[int]]


def load_video(
    source: Any,
    processor: Any = None,
    options: Mapping[str, Any] | None = None,
    call: Mapping[str, Any] | None = None,
) -> tuple[Any, dict[str, Any]]:
    """Decode a video file with PyAV, or open frames as images are opened.

    Args:
        source: A path, bytes, a data URI, a sequence of frames, or an array or tensor of frames.
        processor: The processor that will read the video. Files are sampled as it samples them;
            frames are taken as they are unless `options` or `call` ask for fewer.
        options: Of this video: `fps` and `num_frames`, `min_frames` and `max_frames`. Of frames,
            `fps` is the rate at which they were taken.
        call: What the processor is told of all videos in the call.

    Returns:
        The frames, and which they are of how many a second, as Hugging Face's `VideoMetadata` has
        it. The rate of frames is None unless `fps` says it.

    Raises:
        SampleError: The video cannot be read, or sampled as was asked.
        ImportError: PyAV is missing.
    """
    from transformers.video_utils import VideoMetadata

    options, call = dict(options or {}), dict(call or {})
    source = locate(source)
    reader: Any = getattr(processor, "video_processor", None)

    def choose(metadata: Any) -> list[int]:
        return _sample(reader, metadata, options, call)

    asked = call.get("do_sample_frames")
    if asked is None:
        asked = any(call.get(name) is not None for name in ("fps", "num_frames")) or None
    frames = _frames(source)
    if frames is None:
        if asked is None:
            asked = getattr(reader, "do_sample_frames", False)
        return _decode(source, choose if asked or options else _all)
    rate = options.pop("fps", None)
    metadata = VideoMetadata(len(frames), fps=rate, frames_indices=list(range(len(frames))))
    if asked or options:
        metadata.frames_indices = choose(metadata)
        frames = [frames[index] for index in metadata.frames_indices]
    fields = ("total_num_frames", "fps", "frames_indices")
    return [load_image(frame) for frame in frames], {name: metadata[name] for name in fields}


def _frames(source: Any) -> Sequence[Any] | None:
    if isinstance(source, str | Path | bytes):
        return None
    if not isinstance(source, Sequence) and not (hasattr(source, "shape") and len(source.shape)):
        raise SampleError(
            "A video must be a path, bytes, a data URI, a sequence of frames or an array of them, "
            f"not {type(source).__name__}."
        )
    if not len(source):
        raise SampleError("A video needs at least one frame.")
    frames: Sequence[Any] = source
    return frames


def _all(metadata: Any) -> list[int]:
    return list(range(metadata.total_num_frames))


def _sample(
    reader: Any, metadata: Any, options: Mapping[str, Any], call: Mapping[str, Any]
) -> list[int]:
    """Sample frames by the processor's own function, told what the processor would tell it."""
    if reader is None:
        raise SampleError("This model's processor has no video processor, so it sees no videos.")
    takes = getattr(getattr(reader, "valid_kwargs", None), "__annotations__", {})
    told = {name: getattr(reader, name, None) for name in takes} | dict(call)
    reader, parameters = copy.copy(reader), inspect.signature(reader.sample_frames).parameters
    rates = {"fps", "num_frames"}
    for name in options:
        if name not in parameters and (name in rates or name not in takes):
            raise SampleError(f"{type(reader).__name__} samples frames without {name!r}: drop it.")
    if len(rates & options.keys()) == 1:
        # Either takes the place of the other, whatever the processor has.
        options = dict.fromkeys(rates) | dict(options)
    for name, value in options.items():
        # Some read it from the call, and some from themselves.
        told[name] = value
        setattr(reader, name, value)
    for name in _BEFORE_SAMPLING:
        told.pop(name, None)
    try:
        return [int(index) for index in reader.sample_frames(metadata=metadata, **told)]
    except Exception as error:
        raise SampleError(
            f"{type(reader).__name__} cannot sample a video of {metadata.total_num_frames} frames "
            f"at {metadata.fps} a second: {error!s:.300}"
        ) from error


def _decode(source: str | Path | bytes, choose: _Choose) -> tuple[np.ndarray, dict[str, Any]]:
    require("av", "Reading video files needs PyAV", "video")
    if not isinstance(source, bytes) and not Path(source).is_file():
        raise SampleError(f"Cannot read a video from {describe(source)}: there is no such file.")
    from transformers.video_utils import VideoMetadata

    try:
        count, rate, height, width = _header(source)
        for counted in (False, True):
            if counted or not count:
                count = sum(1 for _ in _decoded(source))
            metadata = VideoMetadata(
                count,
                fps=rate,
                width=width,
                height=height,
                duration=count / rate if rate else None,
                video_backend="pyav",
            )
            indices = choose(metadata)
            frames = _gather(source, indices)
            if frames is not None:
                return frames, {**metadata, "frames_indices": list(indices)}
        raise SampleError(f"no frames {list(indices)!r:.100} among {count}")
    except Exception as error:  # PyAV has one exception class for each of FFmpeg's codes
        what = f"Cannot read a video from {describe(source)}"
        raise SampleError(f"{what}: {error!s:.300}") from error


def _header(source: str | Path | bytes) -> tuple[int, float | None, int, int]:
    """Return the number of frames, 0 where it has to be counted, their rate and their size."""
    import av

    with av.open(open_source(source)) as container:
        stream = next(iter(container.streams.video), None)
        if stream is None:
            raise SampleError("it holds no pictures")
        rate = stream.average_rate or stream.guessed_rate
        height, width, count = stream.height, stream.width, stream.frames
        # Some containers do not say how many frames there are, and some not what is true.
        if count and count != sum(1 for packet in container.demux(stream) if packet.size):
            count = 0
    return count, float(rate) if rate else None, height, width


def _decoded(source: str | Path | bytes) -> Iterator[Any]:
    import av

    with av.open(open_source(source)) as container:
        yield from container.decode(video=0)


def _gather(source: str | Path | bytes, indices: Sequence[int]) -> np.ndarray | None:
    """Return the frames of these numbers, in their order; None where there are not as many."""
    wanted = set(indices)
    if not wanted:
        return None
    frames: dict[int, np.ndarray] = {}
    for number, frame in enumerate(_decoded(source)):
        if number in wanted:
            frames[number] = frame.to_ndarray(format="rgb24")
        if len(frames) == len(wanted):
            return np.stack([frames[index] for index in indices])
    return None

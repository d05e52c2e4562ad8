"""Conversations through a processor, each medium read with its own options."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from miner_lens.data.media import told_of
from miner_lens.data.sample import SampleError
from miner_lens.data.sounds import audio_reader, sound_rate
from miner_lens.models.collate import collate
from miner_lens.models.copies import equal
from miner_lens.models.mistral import is_mistral, with_sound_files

Opened = Sequence[Sequence[Any]]

# The longest sound that each processor has been seen to hear to its end, in samples, and with what
# settings.
_heard: WeakKeyDictionary[Any, tuple[str, int]] = WeakKeyDictionary()


def read(
    processor: Any, opened: Opened, add_generation_prompt: bool, processor_kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """Return what a processor makes of conversations, as Hugging Face calls it, left-padded.

    Args:
        processor: A processor with a tokenizer.
        opened: Conversations from `load_media`.
        add_generation_prompt: Whether to end with the opening of the assistant's turn.
        processor_kwargs: What the processor is told besides, as `apply_chat_template` takes it.

    Raises:
        SampleError: The processor drops the end of a sound, or cannot read media with different
            options in one call.
    """
    _check_names(processor, processor_kwargs)
    told = dict(processor_kwargs)
    # For the text alone: an audio reader's own padding is what its tower takes.
    padding = {"padding": True, "padding_side": "left"}
    padding = {name: value for name, value in padding.items() if name not in told}
    told["text_kwargs"] = padding | told.get("text_kwargs", {})

    def call(conversations: Opened, **more: Any) -> dict[str, Any]:
        return _call(processor, conversations, add_generation_prompt, told | more)

    batch = call(opened)
    if _rates_matter(opened, batch, call, told):
        if len(opened) == 1:
            raise SampleError(
                "This model's processor takes one fps for all videos in a call: give all of them "
                "the same fps."
            )
        apart = [
            read(processor, [messages], add_generation_prompt, processor_kwargs)
            for messages in opened
        ]
        return collate(apart, processor.tokenizer.pad_token_id or 0)
    _check_sounds(processor, opened, call, told_of(processor, "audio", told))
    return batch


def _call(
    processor: Any, opened: Opened, add_generation_prompt: bool, told: dict[str, Any]
) -> dict[str, Any]:
    parts = {kind: list(_parts(opened, kind)) for kind in ("image", "video", "audio")}
    reader = processor
    for kind in ("image", "video"):
        pixels = [_pixels(part) for part in parts[kind]]
        if any(pixels):
            name = f"{kind}_processor"
            reader = copy.copy(reader)
            setattr(reader, name, _Apart(getattr(processor, name), pixels))
    if parts["video"]:
        # `load_media` has sampled them.
        told |= {"do_sample_frames": False}
        told["video_metadata"] = [dict(part["metadata"]) for part in parts["video"]]
        told["videos_kwargs"] = {
            name: value for name, value in told.get("videos_kwargs", {}).items() if name not in told
        }
        rates = _rates(parts["video"])
        if len(rates) == 1 and None not in rates and "fps" not in told:
            told["videos_kwargs"] |= {"fps": rates.pop()}
    if len(parts["audio"]) > 1 and not _pads(processor):
        told["audio_kwargs"] = {"padding": True} | told.get("audio_kwargs", {})
    plain: Any = [[_plain(message) for message in messages] for messages in opened]
    if is_mistral(processor.tokenizer):
        plain = with_sound_files(plain, sound_rate(processor))
    batch = reader.apply_chat_template(
        plain,
        tokenize=True,
        add_generation_prompt=add_generation_prompt,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs=told,
    )
    # PaliGemma's processor adds labels, for training.
    return {name: value for name, value in batch.items() if name != "labels"}


def _parts(opened: Opened, kind: str) -> Iterator[Any]:
    for messages in opened:
        for message in messages:
            if not isinstance(message["content"], str):
                yield from (part for part in message["content"] if part["type"] == kind)


def _plain(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message without what `load_media` adds for us."""
    content = message["content"]
    if not isinstance(content, str):
        ours = ("metadata", "options")
        content = [
            {name: value for name, value in part.items() if name not in ours}
            if part["type"] in ("image", "video")
            else part
            for part in content
        ]
    return {**message, "content": content}


def _pixels(part: Mapping[str, Any]) -> dict[str, Any]:
    options = part.get("options", {})
    return {name: value for name, value in options.items() if name.endswith("_pixels")}


def _rates(parts: Sequence[Any]) -> set[float | None]:
    return {part.get("options", {}).get("fps") for part in parts}


class _Apart:
    """A part of a processor that reads each medium by itself, with options of its own."""

    def __init__(self, reader: Any, options: Sequence[Mapping[str, int]]) -> None:
        self._reader, self._options = reader, options

    def __getattr__(self, name: str) -> Any:
        return getattr(self._reader, name)

    def __call__(self, media: Any, **told: Any) -> Any:
        from transformers.feature_extraction_utils import BatchFeature
        from transformers.image_utils import make_flat_list_of_images
        from transformers.video_utils import make_batched_videos

        metadata = told.pop("video_metadata", None)
        flat: Any = (
            make_flat_list_of_images(media) if metadata is None else make_batched_videos(media)
        )
        results = []
        for number, (medium, options) in enumerate(zip(flat, self._options, strict=True)):
            own = self._limits(told, options) if options else {}
            if metadata is not None:
                own["video_metadata"] = [metadata[number]]
            results.append(self._reader([medium], **told | own))
        try:
            joined = {name: _joined([r[name] for r in results]) for name in results[0]}
        except RuntimeError as error:
            raise SampleError(
                f"{type(self._reader).__name__} cannot read media with different options in one "
                f"batch: {error}"
            ) from error
        return BatchFeature(joined)

    def _limits(self, told: Mapping[str, Any], options: Mapping[str, int]) -> dict[str, Any]:
        size = dict(told.get("size") or getattr(self._reader, "size", None) or {})
        # Their new name, where a processor has both.
        renamed = {"min_pixels": "shortest_edge", "max_pixels": "longest_edge"}
        if not all(size.get(name) for name in renamed.values()):
            return dict(options)
        edges = {name: size[name] for name in renamed.values()}
        return {"size": edges | {renamed[name]: value for name, value in options.items()}}


def _joined(values: list[Any]) -> Any:
    if isinstance(values[0], Tensor):
        return torch.cat(values)
    return [item for value in values for item in value]


def _pads(processor: Any) -> bool:
    """True if a processor makes sounds of different lengths one tensor without being told."""
    if "padding" in getattr(processor, "audio_kwargs", {}):
        return True
    padding = inspect.signature(audio_reader(processor).__call__).parameters.get("padding")
    return padding is None or bool(padding.default)


def _rates_matter(
    opened: Opened, batch: Mapping[str, Any], call: Callable[..., Any], told: Mapping[str, Any]
) -> bool:
    """True if the processor is told one rate for all videos, and these have several."""
    rates = _rates(list(_parts(opened, "video")))
    if len(rates) < 2 or "fps" in told:
        return False
    group = told.get("videos_kwargs", {})
    named = rates - {None}
    return not all(equal(batch, call(opened, videos_kwargs=group | {"fps": r})) for r in named)


def _check_names(processor: Any, processor_kwargs: Mapping[str, Any]) -> None:
    """Refuse what the processor would pass by without a word."""
    if not processor_kwargs:
        return
    declared = getattr(getattr(processor, "valid_processor_kwargs", None), "__annotations__", {})
    names = {"common_kwargs", *declared, *inspect.signature(processor.__call__).parameters}
    parts = (getattr(processor, f"{kind}_processor", None) for kind in ("image", "video"))
    for kwargs in (*declared.values(), *(getattr(part, "valid_kwargs", None) for part in parts)):
        names |= {*getattr(kwargs, "__annotations__", {})}
    for name in processor_kwargs:
        if declared and name not in names:
            raise TypeError(f"{type(processor).__name__} has no option {name!r}")


def _check_sounds(
    processor: Any, opened: Opened, call: Callable[..., Any], told: Mapping[str, Any]
) -> None:
    """Refuse sounds whose end makes no difference to the model's inputs."""
    longest = max((len(part["audio"]) for part in _parts(opened, "audio")), default=0)
    if not longest:
        return
    reader = audio_reader(processor)
    own = {name: v for name, v in vars(processor).items() if isinstance(v, int | float | str)}
    settings = repr((reader.to_dict(), own, told))
    before, heard = _heard.get(processor, ("", 0))
    heard = heard if before == settings else 0
    if longest <= heard:
        return
    for messages in opened:
        for part in _parts([messages], "audio"):
            if len(part["audio"]) > heard:
                _check_end(messages, part, sound_rate(processor, told), call)
    _heard[processor] = (settings, longest)


def _check_end(messages: Sequence[Any], part: Any, rate: int, call: Callable[..., Any]) -> None:
    def inputs(sound: np.ndarray) -> Any:
        try:
            return call([_with_sound(messages, part, sound)])
        except Exception:  # Too short for the processor, say.
            return {"input_ids": None}

    def dropped(sound: np.ndarray) -> int:
        """Return how many samples at the end make no difference."""
        expected, most = inputs(sound), len(sound)
        least = 0
        while most - least > 1:
            middle = (least + most) // 2
            same = equal(expected, inputs(sound[:middle]))
            least, most = (least, middle) if same else (middle, most)
        return len(sound) - most

    sound: np.ndarray = part["audio"]
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, len(sound)).astype(np.float32)
    end, more, expected = rate // 100, noise[: rate // 2], inputs(sound)
    for changed in ((sound[:-end], noise[:end]), (sound, more)):
        if not equal(expected, inputs(np.concatenate(changed))):
            return
    # Features are made of whole frames: of a shorter sound the same rest makes no difference.
    lost = dropped(noise)
    if lost > dropped(noise[:-rate]):
        raise SampleError(
            f"The sound lasts {len(sound) / rate:.1f} s; the model hears "
            f"{round((len(sound) - lost) / rate, 1):g} s. Cut it into pieces."
        )


def _with_sound(messages: Sequence[Any], part: Any, sound: np.ndarray) -> list[Any]:
    def swapped(content: Any) -> Any:
        if isinstance(content, str):
            return content
        return [{**item, "audio": sound} if item is part else item for item in content]

    return [{**message, "content": swapped(message["content"])} for message in messages]

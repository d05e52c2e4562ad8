"""One example of a data set: a conversation, the answers that count as right, and an id."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Message = Mapping[str, Any]


@dataclass(frozen=True)
class Sample:
    """A conversation in Hugging Face chat format, with its accepted answers.

    Any iterable of samples is a data set.

    Attributes:
        messages: Messages as a Hugging Face processor's `apply_chat_template` takes
            them: `{"role": ..., "content": [{"type": "image", "image": ...}, ...]}`.
            An image is a PIL image, a path or the bytes of an image file; a video is a
            path or a sequence of frames; a sound is a path, bytes, or an array together
            with its `sampling_rate`.
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
    label: str | None = None

    @classmethod
    def of(cls, item):
        return item if isinstance(item, cls) else cls(item['messages'], tuple(item['answers']), item.get('id'))


class SampleError(ValueError):
    """A sample that cannot be used; `run(..., on_error="skip")` passes over it."""

"""One example of a data set: a conversation, the answers that count as right, and an id."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
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
            A medium is a path, a file's bytes, a data URI or base64; an image also a PIL
            image, an array or a tensor; a video also a sequence of frames; a sound also
            an array together with its `sampling_rate`.
        answers: The answers that count as right, a tuple; empty where there is none. A single
            string is one answer.
        id: What error messages and tables call this sample.
        label: The group that the sample belongs to, for analyses that compare groups.
            `ml.run(model, {"shapes": data, "digits": others}, ...)` labels samples by these names.

    Raises:
        TypeError: `answers` is neither a string nor a list of strings.

    Example:
        >>> sample = Sample([{"role": "user", "content": "What is red?"}], "a colour", "q1")
        >>> sample.answers
        ('a colour',)
    """

    messages: Sequence[Message]
    answers: Sequence[str] = ()
    id: str | None = None
    label: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "answers", _answers(self.answers))

    @classmethod
    def of(cls, item: Any) -> Sample:
        """The sample that an item of a data set is.

        Args:
            item: A sample, or a mapping with `messages` and, if there are any, `answers` (a string
                or a list of strings), `id` and `label`, such as a row of a `datasets.Dataset`.

        Raises:
            TypeError: The item is something else, or its answers are no strings.
            ValueError: The mapping has no messages.

        Example:
            >>> row = {"messages": [{"role": "user", "content": "2 + 2?"}], "answers": "4", "id": 7}
            >>> Sample.of(row).answers, Sample.of(row).id
            (('4',), '7')
        """
        if isinstance(item, cls):
            return item
        if not isinstance(item, Mapping):
            raise TypeError(
                "An item of a data set must be a Sample, or a mapping with messages and answers, "
                f"not {type(item).__name__}."
            )
        if item.get("messages") is None:
            raise ValueError(
                "A mapping needs messages to be a sample; this one has "
                f"{', '.join(map(repr, item)) or 'nothing'}. For a table whose columns have other "
                "names, use ml.datasets.from_rows(rows, messages=..., answers=...)."
            )
        answers = item.get("answers")
        return cls(
            item["messages"],
            () if answers is None else answers,
            _text(item.get("id")),
            _text(item.get("label")),
        )


class SampleError(ValueError):
    """A sample that cannot be used; `run(..., on_error="skip")` passes over it."""


def _answers(given: Any) -> tuple[str, ...]:
    if isinstance(given, str):
        return (given,)
    # A mapping is iterable too, but its keys are no answers.
    several = (
        tuple(given) if isinstance(given, Iterable) and not isinstance(given, Mapping) else None
    )
    if several is None or not all(isinstance(answer, str) for answer in several):
        raise TypeError(
            "answers must be a string or a list of strings, such as ['two', '2'], not "
            f"{given!r:.100}."
        )
    return several


def _text(value: Any) -> str | None:
    # Tables number their rows and classes.
    return None if value is None else str(value)

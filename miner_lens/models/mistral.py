"""Mistral's own tokenizers (the package mistral-common), which Voxtral's processor comes with."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import Any


def is_mistral(tokenizer: Any) -> bool:
    """Whether a tokenizer is one of them; TransformerLens cannot set these up."""
    return type(tokenizer).__name__ == "MistralCommonBackend"


def with_sound_files(
    conversations: Sequence[Sequence[Any]], sampling_rate: int
) -> list[list[dict[str, Any]]]:
    """Conversations with each sound as a file in text, as these tokenizers take them.

    Args:
        conversations: With sounds as waveforms of one channel.
        sampling_rate: Of the sounds, in Hz.
    """
    return [[_spelled(message, sampling_rate) for message in one] for one in conversations]


def _spelled(message: Any, sampling_rate: int) -> dict[str, Any]:
    content = message["content"]
    if not isinstance(content, str):
        content = [_file(part, sampling_rate) for part in content]
    return {**message, "content": content}


def _file(part: Any, sampling_rate: int) -> Any:
    if part["type"] != "audio":
        return part
    import soundfile

    file = io.BytesIO()
    soundfile.write(file, part["audio"], sampling_rate, format="WAV", subtype="FLOAT")
    return {"type": "audio", "base64": base64.b64encode(file.getvalue()).decode()}

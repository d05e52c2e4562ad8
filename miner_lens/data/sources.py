"""Where a medium is: a path, a file's bytes, or a text that says either."""

from __future__ import annotations

import base64
import binascii
import importlib.util
import io
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import unquote, unquote_to_bytes

from miner_lens.data.sample import SampleError

# No file that holds a medium is shorter in base64, and few paths are as long and have no dot.
_SHORTEST_BASE64 = 32


def locate(source: Any) -> Any:
    """Return a path or the bytes of a file, where a source names or contains one.

    Args:
        source: A path, bytes, a `file://` or `data:` URI, a file in base64, or a mapping that holds
            one of these, as chat APIs (`{"url": ...}`, `{"data": ..., "format": ...}`) and tables
            (`{"bytes": ..., "path": ...}`, either of them None) write them. Everything else is
            returned as it is.

    Raises:
        SampleError: The source is in a network, or a URI cannot be read.
    """
    if isinstance(source, Mapping) and "array" not in source:
        keys = ("url", "data", "base64", "bytes", "path")
        source = next((source[key] for key in keys if source.get(key)), source)
    if isinstance(source, bytearray | memoryview):
        return bytes(source)
    if not isinstance(source, str):
        return source
    scheme = re.match(r"([a-z][a-z0-9+.-]+)://", source[:40], re.IGNORECASE)
    if scheme and scheme[1].lower() != "file":
        raise SampleError(
            f"Nothing is fetched from a network: download {shorten(source)} first, and give its "
            "path or its bytes."
        )
    if scheme:
        return _file_of_uri(source[len(scheme[0]) :])
    if source[:5].lower() == "data:":
        return _bytes_of_uri(source)
    if len(source) >= _SHORTEST_BASE64 and not os.path.isfile(source):
        return _decode(source) or source
    return source


def _file_of_uri(path: str) -> str:
    if path.startswith("localhost/"):
        path = path.removeprefix("localhost")
    return path if os.path.isfile(path) else unquote(path)


def _bytes_of_uri(uri: str) -> bytes:
    head, comma, text = uri.partition(",")
    decoded = _decode(text) if head.endswith(";base64") else unquote_to_bytes(text)
    if not comma or not decoded:
        raise SampleError(
            f"Cannot read {shorten(uri)}: a data URI is 'data:image/png;base64,' and the file in "
            "base64."
        )
    return decoded


def _decode(text: str) -> bytes | None:
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError):
        return None


def open_source(source: str | Path | bytes) -> Any:
    """Return what a decoder opens: the name of a file, or bytes as a file."""
    return io.BytesIO(source) if isinstance(source, bytes) else str(source)


def describe(source: Any) -> str:
    """Return what an error calls a source."""
    return f"{len(source)} bytes" if isinstance(source, bytes) else shorten(str(source))


def shorten(text: str, most: int = 100) -> str:
    """Return a text in quotes, without its middle where it is long."""
    if len(text) <= most:
        return repr(text)
    half = most // 2
    return f"{text[:half]!r}...{text[-half:]!r} ({len(text)} characters)"


def require(package: str, need: str, extra: str) -> None:
    """Check that a package is installed.

    Raises:
        ImportError: It is missing; the message says what to install.
    """
    if importlib.util.find_spec(package) is None:
        raise ImportError(f"{need}: pip install 'miner-lens[{extra}]'.")

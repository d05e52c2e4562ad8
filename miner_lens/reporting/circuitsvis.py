"""circuitsvis's own JavaScript, by which a page draws tokens without a network."""

from __future__ import annotations

from functools import cache
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

PACKAGE = "circuitsvis"
# What its Python functions load from a CDN; the package has the same file.
BUNDLE = "dist/cdn/iife.js"


@cache
def bundle() -> str:
    """The script, as a page can hold it; it makes `CircuitsVis`. Empty where it is not installed.

    Taken from the package's files, because importing it would bring nothing else.
    """
    spec = find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        return ""
    path = Path(spec.origin).parent / BUNDLE
    if not path.is_file():
        return ""
    script = path.read_text("utf-8")
    # In a string of its own the bundle has what would end the page's script.
    script = script.replace("</script", r"<\/script")
    return script.rpartition("//# sourceMappingURL=")[0] or script


def version() -> str:
    """Which circuitsvis is installed."""
    return metadata.version(PACKAGE)

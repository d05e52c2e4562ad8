"""On what, offline? Small trained checkpoints that ship with the package, for demos and tests."""

from __future__ import annotations

from pathlib import Path

__all__ = ["names", "path"]

_FOLDER = Path(__file__).parent


def names() -> tuple[str, ...]:
    """The organisms that ship with this installation.

    Example:
        >>> "shapes" in names()
        True
    """
    return tuple(sorted(file.parent.name for file in _FOLDER.glob("*/config.json")))


def path(name: str) -> Path:
    """Folder of a shipped checkpoint, as Hugging Face's `from_pretrained` takes it.

    `shapes` is a Qwen2-VL of 1.8 M parameters that answers easy-VQA's questions about an
    image of one coloured shape, or about a sentence that describes it. `speech` is a
    Qwen2-Audio of 1.6 M parameters that answers questions about one coloured shape that
    somebody describes, aloud or in writing.

    Raises:
        ValueError: No organism of that name ships with this installation.

    Example:
        >>> path("shapes").name
        'shapes'
    """
    if name not in names():
        known = ", ".join(map(repr, names())) or "none"
        raise ValueError(f"Unknown organism {name!r}; this installation has {known}.")
    return _FOLDER / name

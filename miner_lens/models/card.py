"""Cards of what is published on the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Sequence

from huggingface_hub import ModelCard, ModelCardData

LIBRARY = "miner-lens"
TAGS = ("interpretability", "modality-specific-neurons", "transformer-lens")


def card(
    title: str, paragraphs: Sequence[str], base_model: str | None, library: str = LIBRARY
) -> ModelCard:
    """A card with the metadata by which the hub finds it.

    Args:
        title: The heading.
        paragraphs: What follows it, as Markdown.
        base_model: The model that it belongs to; the hub is told of it where this is a hub id.
        library: Which library loads it.
    """
    is_id = base_model is not None and base_model.count("/") == 1
    data = ModelCardData(
        base_model=base_model if is_id else None, library_name=library, tags=sorted(TAGS)
    )
    text = "\n\n".join([f"# {title}", *paragraphs])
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}\n")


def code(text: str, language: str = "") -> str:
    """A block of code."""
    return f"```{language}\n{text}\n```"

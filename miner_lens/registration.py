"""Make TransformerLens know our adapters as soon as both are imported.

TransformerLens finds external adapters by entry point, but `boot_transformers` first looks into
two static tables, so each adapter's class name has to stand there as well. Remove this file when
TransformerLens consults the entry points there too.
"""

from __future__ import annotations

from importlib.metadata import entry_points
from typing import Any

import wrapt

ENTRY_POINTS = "transformer_lens.architectures"


def register() -> None:
    """Fill TransformerLens's tables now if it is imported already, else when it is."""
    wrapt.register_post_import_hook(_fill_tables, "transformer_lens")


def _fill_tables(_: Any) -> None:
    from transformer_lens.factories.architecture_adapter_factory import SUPPORTED_ARCHITECTURES
    from transformer_lens.utilities.architectures import MULTIMODAL_ARCHITECTURES

    for entry in entry_points(group=ENTRY_POINTS):
        if entry.value.startswith("miner_lens_adapters.") and (
            entry.name not in SUPPORTED_ARCHITECTURES
        ):
            SUPPORTED_ARCHITECTURES[entry.name] = entry.load()
            MULTIMODAL_ARCHITECTURES.add(entry.name)

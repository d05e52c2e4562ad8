"""Make TransformerLens know our adapters as soon as both are imported.

TransformerLens finds external adapters by entry point, but `boot_transformers` first looks into
two static tables, so each adapter's class name has to stand there as well. Remove this file when
TransformerLens consults the entry points there too.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import wrapt

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

ENTRY_POINTS = "transformer_lens.architectures"
OVERRIDES = "miner_lens.overrides"


def register() -> None:
    """Fill TransformerLens's tables now if it is imported already, else when it is."""
    wrapt.register_post_import_hook(_fill_tables, "transformer_lens")


def _fill_tables(_: Any) -> None:
    from importlib.metadata import entry_points

    from transformer_lens.factories.architecture_adapter_factory import (
        SUPPORTED_ARCHITECTURES,
        ArchitectureAdapterFactory,
    )
    from transformer_lens.utilities.architectures import MULTIMODAL_ARCHITECTURES

    for entry in entry_points(group=ENTRY_POINTS):
        if entry.value.startswith("miner_lens_adapters.") and (
            entry.name not in SUPPORTED_ARCHITECTURES
        ):
            # Not the class itself: its module may be the one that is importing TransformerLens.
            SUPPORTED_ARCHITECTURES[entry.name] = partial(_construct, entry)
            MULTIMODAL_ARCHITECTURES.add(entry.name)
    for entry in entry_points(group=OVERRIDES):
        ArchitectureAdapterFactory.register_adapter(entry.name, partial(_construct, entry))


def _construct(entry: EntryPoint, cfg: Any) -> Any:
    return entry.load()(cfg)

"""Cards of the neurons that rank first, so that a report shows what was selected."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from miner_lens import launchers
from miner_lens.experiments.card import NeuronCard, card
from miner_lens.experiments.plan import weighted
from miner_lens.scoring.scores import ImportanceScores

# Of each data set, so many samples show what the neurons do.
SAMPLES = 8


def first_cards(
    model: Any,
    data: Mapping[str, Sequence[Any]],
    scores: ImportanceScores,
    modalities: Iterable[str],
    folder: str | Path | None = None,
    batch_size: int = 8,
    progress: bool = True,
) -> dict[str, NeuronCard]:
    """A card of each modality's neuron that ranks first, by the weights that `select` uses.

    Args:
        model: A `TransformerBridge` with a processor.
        data: Samples by name; of each, the first are looked at.
        scores: What `ml.mine` returns.
        modalities: Some of those that occur.
        folder: Where the cards are, or else go to.
        batch_size: Samples in one forward pass.
        progress: Whether to show progress bars.

    Raises:
        ValueError: As `ml.card`.
    """
    some = {name: samples[:SAMPLES] for name, samples in data.items()}
    found = {}
    for modality in modalities:
        ranked = weighted(scores, [modality])[0]
        layer, neuron = divmod(int(ranked.argmax()), scores.neurons)
        path = None if folder is None else Path(folder) / f"{modality}-{layer}-{neuron}.safetensors"
        if path is not None and path.is_file():
            found[modality] = NeuronCard.load(path)
            continue
        how: dict[str, Any] = {"batch_size": batch_size, "progress": progress}
        found[modality] = card(model, some, layer, neuron, [scores], k=3, **how)
        if path is not None and launchers.rank() == 0:  # all ranks have it
            found[modality].save(path)
    return found

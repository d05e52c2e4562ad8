"""How important is each neuron? MINER's arithmetic, without a model."""

from miner_lens.scoring.scores import ImportanceScores
from miner_lens.scoring.selection import Selection

__all__ = ["ImportanceScores", "Selection"]

"""How important is each neuron? MINER's arithmetic, without a model."""

from miner_lens.scoring.domain_counts import DomainCounts
from miner_lens.scoring.hidden_states import HiddenStates
from miner_lens.scoring.kinds import NeuronKinds
from miner_lens.scoring.scores import ImportanceScores
from miner_lens.scoring.selection import Selection
from miner_lens.scoring.semantic_reach import SemanticReach
from miner_lens.scoring.tuned_lens import TunedLens

__all__ = [
    "DomainCounts",
    "HiddenStates",
    "ImportanceScores",
    "NeuronKinds",
    "Selection",
    "SemanticReach",
    "TunedLens",
]

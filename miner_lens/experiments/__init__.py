"""What does it do? What a model still knows with neurons switched off."""

from miner_lens.experiments.attention_effect import AttentionEffect, attention_effect
from miner_lens.experiments.evaluation import accuracy, answers
from miner_lens.experiments.layers import LayerDistribution, layer_distribution
from miner_lens.experiments.overlap import Overlap, overlap
from miner_lens.experiments.recovery import Recovery, recovery
from miner_lens.experiments.stability import Stability, stability
from miner_lens.experiments.trials import Condition, Trials, trials

__all__ = [
    "AttentionEffect",
    "Condition",
    "LayerDistribution",
    "Overlap",
    "Recovery",
    "Stability",
    "Trials",
    "accuracy",
    "answers",
    "attention_effect",
    "layer_distribution",
    "overlap",
    "recovery",
    "stability",
    "trials",
]

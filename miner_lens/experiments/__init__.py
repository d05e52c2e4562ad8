"""What does it do? What a model still knows with neurons switched off."""

from miner_lens.experiments.attention_effect import AttentionEffect, attention_effect
from miner_lens.experiments.domains import DomainMatrix, domain_matrix
from miner_lens.experiments.evaluate import Evaluation, evaluate
from miner_lens.experiments.evaluation import accuracy, answers
from miner_lens.experiments.flow import InformationFlow, information_flow
from miner_lens.experiments.layers import LayerDistribution, layer_distribution
from miner_lens.experiments.overlap import Overlap, overlap
from miner_lens.experiments.patching import Patching, activation_patching, counterfactuals
from miner_lens.experiments.recovery import Recovery, recovery
from miner_lens.experiments.stability import Stability, stability
from miner_lens.experiments.trials import Condition, Trials, trials

__all__ = [
    "AttentionEffect",
    "Condition",
    "DomainMatrix",
    "Evaluation",
    "InformationFlow",
    "LayerDistribution",
    "Overlap",
    "Patching",
    "Recovery",
    "Stability",
    "Trials",
    "accuracy",
    "activation_patching",
    "answers",
    "attention_effect",
    "counterfactuals",
    "domain_matrix",
    "evaluate",
    "information_flow",
    "layer_distribution",
    "overlap",
    "recovery",
    "stability",
    "trials",
]

"""What does it do? What a model still knows with neurons switched off."""

from miner_lens.experiments.domains import DomainMatrix, domain_matrix
from miner_lens.experiments.evaluation import accuracy, answers
from miner_lens.experiments.flow import InformationFlow, information_flow
from miner_lens.experiments.patching import Patching, activation_patching, counterfactuals
from miner_lens.experiments.trials import Condition, Trials, trials

__all__ = [
    "Condition",
    "DomainMatrix",
    "InformationFlow",
    "Patching",
    "Trials",
    "accuracy",
    "activation_patching",
    "answers",
    "counterfactuals",
    "domain_matrix",
    "information_flow",
    "trials",
]

"""What does it do? What a model still knows with neurons switched off."""

from miner_lens.experiments.attention_effect import AttentionEffect, attention_effect
from miner_lens.experiments.evaluation import accuracy, answers
from miner_lens.experiments.recovery import Recovery, recovery
from miner_lens.experiments.trials import Condition, Trials, trials

__all__ = [
    "AttentionEffect",
    "Condition",
    "Recovery",
    "Trials",
    "accuracy",
    "answers",
    "attention_effect",
    "recovery",
    "trials",
]

"""What does it do? What a model still knows with neurons switched off."""

from miner_lens.experiments.evaluation import accuracy, answers

__all__ = ["accuracy", "answers"]

"""What does it look like? Figures from results, computing nothing."""

from miner_lens.report import plots

__all__ = ["plots"]

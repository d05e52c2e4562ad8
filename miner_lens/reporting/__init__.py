"""What does it look like? Figures, tables and the report, from results, computing nothing."""

from miner_lens.reporting import plots
from miner_lens.reporting.page import report

__all__ = ["plots", "report"]

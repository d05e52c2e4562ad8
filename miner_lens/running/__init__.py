"""How are data passed through? One pass, any number of analyzers, processes and restarts."""

from miner_lens.running.distributed import RankError
from miner_lens.running.run import Analyzer, Batch, run

__all__ = ["Analyzer", "Batch", "RankError", "run"]

"""How are data passed through? One pass, any number of analyzers, processes and restarts."""

from miner_lens.running.analyzer import Analyzer
from miner_lens.running.batch import Batch
from miner_lens.running.distributed import RankError
from miner_lens.running.run import run

__all__ = ["Analyzer", "Batch", "RankError", "run"]

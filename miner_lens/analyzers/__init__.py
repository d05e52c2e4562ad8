"""What is read? One file for each analysis."""

from miner_lens.analyzers.attribution import AttributionAnalyzer, attribute
from miner_lens.analyzers.domains import DomainAnalyzer
from miner_lens.analyzers.importance import ImportanceAnalyzer, mine
from miner_lens.analyzers.lens import LogitLens, LogitLensAnalyzer
from miner_lens.analyzers.reading import logit_lens

__all__ = [
    "AttributionAnalyzer",
    "DomainAnalyzer",
    "ImportanceAnalyzer",
    "LogitLens",
    "LogitLensAnalyzer",
    "attribute",
    "logit_lens",
    "mine",
]

"""What is read? One file for each analysis."""

from miner_lens.analyzers.attribution import AttributionAnalyzer, attribute
from miner_lens.analyzers.domains import DomainAnalyzer
from miner_lens.analyzers.importance import ImportanceAnalyzer, mine

__all__ = ["AttributionAnalyzer", "DomainAnalyzer", "ImportanceAnalyzer", "attribute", "mine"]

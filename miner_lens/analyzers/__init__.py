"""What is read? One file for each analysis."""

from miner_lens.analyzers.attention_flow import AttentionFlow, AttentionFlowAnalyzer
from miner_lens.analyzers.attribution import AttributionAnalyzer, attribute
from miner_lens.analyzers.contribution import ContributionAnalyzer
from miner_lens.analyzers.convergence import ConvergenceAnalyzer
from miner_lens.analyzers.domains import DomainAnalyzer
from miner_lens.analyzers.importance import ImportanceAnalyzer, mine
from miner_lens.analyzers.integrated import integrated_gradients
from miner_lens.analyzers.kinds import KindAnalyzer
from miner_lens.analyzers.lens import LogitLens, LogitLensAnalyzer
from miner_lens.analyzers.reading import logit_lens
from miner_lens.analyzers.semantic_reach import SemanticReachAnalyzer
from miner_lens.analyzers.top_activations import TopActivationsAnalyzer
from miner_lens.analyzers.tuning import (
    LensDivergence,
    LensDivergenceAnalyzer,
    TunedLensAnalyzer,
)

__all__ = [
    "AttentionFlow",
    "AttentionFlowAnalyzer",
    "AttributionAnalyzer",
    "ContributionAnalyzer",
    "ConvergenceAnalyzer",
    "DomainAnalyzer",
    "ImportanceAnalyzer",
    "KindAnalyzer",
    "LensDivergence",
    "LensDivergenceAnalyzer",
    "LogitLens",
    "LogitLensAnalyzer",
    "SemanticReachAnalyzer",
    "TopActivationsAnalyzer",
    "TunedLensAnalyzer",
    "attribute",
    "integrated_gradients",
    "logit_lens",
    "mine",
]

"""What does it do? What a model still knows with neurons switched off."""

from miner_lens.experiments.ablation_table import (
    AblationTable,
    ablation_plan,
    ablation_table,
    read_ablation,
)
from miner_lens.experiments.attention_effect import AttentionEffect, attention_effect
from miner_lens.experiments.card import NeuronCard, card
from miner_lens.experiments.condition import Condition
from miner_lens.experiments.domains import DomainMatrix, domain_matrix
from miner_lens.experiments.evaluate import Evaluation, evaluate
from miner_lens.experiments.evaluation import accuracy, answers
from miner_lens.experiments.flow import InformationFlow, information_flow
from miner_lens.experiments.layers import LayerDistribution, layer_distribution
from miner_lens.experiments.metric_comparison import (
    MetricComparison,
    comparison_plan,
    metric_comparison,
    read_comparison,
)
from miner_lens.experiments.mmneuron import DATA_SETS, MMNeuron, mmneuron
from miner_lens.experiments.necessity import Necessity, necessity, necessity_plan, read_necessity
from miner_lens.experiments.overlap import Overlap, overlap
from miner_lens.experiments.patching import Patching, activation_patching, counterfactuals
from miner_lens.experiments.plan import Ablation, Plan
from miner_lens.experiments.protocol import MINER, Protocol, Source, reproduce
from miner_lens.experiments.ratio_sweep import RatioSweep, ratio_plan, ratio_sweep, read_ratios
from miner_lens.experiments.recovery import Recovery, recovery
from miner_lens.experiments.result import Finding
from miner_lens.experiments.selection_grid import (
    SelectionGrid,
    grid_plan,
    read_grid,
    selection_grid,
)
from miner_lens.experiments.specificity import (
    Specificity,
    read_specificity,
    specificity,
    specificity_plan,
)
from miner_lens.experiments.stability import Stability, stability
from miner_lens.experiments.table import Trials
from miner_lens.experiments.transfer import Transfer, read_transfer, transfer, transfer_plan
from miner_lens.experiments.trials import trials
from miner_lens.experiments.values import AblationValues, ablation_values, read_values, value_plan

__all__ = [
    "DATA_SETS",
    "MINER",
    "Ablation",
    "AblationTable",
    "AblationValues",
    "AttentionEffect",
    "Condition",
    "DomainMatrix",
    "Evaluation",
    "Finding",
    "InformationFlow",
    "LayerDistribution",
    "MMNeuron",
    "MetricComparison",
    "Necessity",
    "NeuronCard",
    "Overlap",
    "Patching",
    "Plan",
    "Protocol",
    "RatioSweep",
    "Recovery",
    "SelectionGrid",
    "Source",
    "Specificity",
    "Stability",
    "Transfer",
    "Trials",
    "ablation_plan",
    "ablation_table",
    "ablation_values",
    "accuracy",
    "activation_patching",
    "answers",
    "attention_effect",
    "card",
    "comparison_plan",
    "counterfactuals",
    "domain_matrix",
    "evaluate",
    "grid_plan",
    "information_flow",
    "layer_distribution",
    "metric_comparison",
    "mmneuron",
    "necessity",
    "necessity_plan",
    "overlap",
    "ratio_plan",
    "ratio_sweep",
    "read_ablation",
    "read_comparison",
    "read_grid",
    "read_necessity",
    "read_ratios",
    "read_specificity",
    "read_transfer",
    "read_values",
    "recovery",
    "reproduce",
    "selection_grid",
    "specificity",
    "specificity_plan",
    "stability",
    "transfer",
    "transfer_plan",
    "trials",
    "value_plan",
]

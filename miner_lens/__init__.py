"""Find modality-specific neurons in multimodal language models, switch them off, see what it does.

A TransformerLens plugin that implements MINER (arXiv 2410.04819):

    import miner_lens as ml

    model = ml.load("shapes")
    scores = ml.mine(model, ml.datasets.load("easy-vqa", limit=100))
    msns = scores.select(ratio=0.02)
    with ml.ablate(model, msns["image"]):
        answer = ml.generate(model, messages)

Importing this package imports neither torch nor transformer_lens; names load when first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from miner_lens import registration

if TYPE_CHECKING:
    from miner_lens import experiments, organisms
    from miner_lens.analyzers import (
        AttentionFlow,
        AttentionFlowAnalyzer,
        AttributionAnalyzer,
        ContributionAnalyzer,
        ConvergenceAnalyzer,
        DomainAnalyzer,
        ImportanceAnalyzer,
        KindAnalyzer,
        LensDivergence,
        LensDivergenceAnalyzer,
        LogitLens,
        LogitLensAnalyzer,
        SemanticReachAnalyzer,
        TopActivationsAnalyzer,
        TunedLensAnalyzer,
        attribute,
        integrated_gradients,
        logit_lens,
        mine,
    )
    from miner_lens.data import Sample, SampleError, datasets, metrics
    from miner_lens.experiments import (
        Condition,
        DomainMatrix,
        Evaluation,
        InformationFlow,
        NeuronCard,
        Patching,
        Trials,
        accuracy,
        activation_patching,
        answers,
        counterfactuals,
        domain_matrix,
        information_flow,
    )
    from miner_lens.experiments.card import card
    from miner_lens.experiments.evaluate import evaluate
    from miner_lens.experiments.trials import trials
    from miner_lens.models import (
        ModalityLayout,
        ModelIdentity,
        Point,
        activation_points,
        bind,
        check_family,
        generate,
        inputs,
        load,
        pattern_points,
        residual_points,
        unwrap,
        wrap,
    )
    from miner_lens.neurons import (
        NeuronSet,
        ablate,
        ablation_hooks,
        bake,
        scale,
    )
    from miner_lens.neurons.knockout import knockout
    from miner_lens.reporting import plots, report
    from miner_lens.running import Analyzer, Batch, RankError
    from miner_lens.running.run import run
    from miner_lens.scoring import (
        DomainCounts,
        HiddenStates,
        ImportanceScores,
        NeuronKinds,
        Selection,
        SemanticReach,
        TunedLens,
        kernels,
    )

__version__ = "0.1.0"

_HOMES = {
    "Analyzer": "running",
    "AttentionFlow": "analyzers",
    "AttentionFlowAnalyzer": "analyzers",
    "AttributionAnalyzer": "analyzers",
    "Batch": "running",
    "Condition": "experiments",
    "ContributionAnalyzer": "analyzers",
    "ConvergenceAnalyzer": "analyzers",
    "DomainAnalyzer": "analyzers",
    "DomainCounts": "scoring",
    "DomainMatrix": "experiments",
    "Evaluation": "experiments",
    "HiddenStates": "scoring",
    "ImportanceAnalyzer": "analyzers",
    "ImportanceScores": "scoring",
    "InformationFlow": "experiments",
    "KindAnalyzer": "analyzers",
    "LensDivergence": "analyzers",
    "LensDivergenceAnalyzer": "analyzers",
    "LogitLens": "analyzers",
    "LogitLensAnalyzer": "analyzers",
    "ModalityLayout": "models",
    "ModelIdentity": "models",
    "NeuronCard": "experiments",
    "NeuronKinds": "scoring",
    "NeuronSet": "neurons",
    "Patching": "experiments",
    "Point": "models",
    "RankError": "running",
    "Sample": "data",
    "SampleError": "data",
    "Selection": "scoring",
    "SemanticReach": "scoring",
    "SemanticReachAnalyzer": "analyzers",
    "TopActivationsAnalyzer": "analyzers",
    "Trials": "experiments",
    "TunedLens": "scoring",
    "TunedLensAnalyzer": "analyzers",
    "ablate": "neurons",
    "ablation_hooks": "neurons",
    "accuracy": "experiments",
    "activation_patching": "experiments",
    "activation_points": "models",
    "answers": "experiments",
    "attribute": "analyzers",
    "bake": "neurons",
    "bind": "models",
    "card": "experiments",
    "check_family": "models",
    "counterfactuals": "experiments",
    "domain_matrix": "experiments",
    "evaluate": "experiments",
    "generate": "models",
    "information_flow": "experiments",
    "inputs": "models",
    "integrated_gradients": "analyzers",
    "knockout": "neurons",
    "load": "models",
    "logit_lens": "analyzers",
    "mine": "analyzers",
    "pattern_points": "models",
    "report": "reporting",
    "residual_points": "models",
    "run": "running",
    "scale": "neurons",
    "trials": "experiments",
    "unwrap": "models",
    "wrap": "models",
}
_MODULES = {
    "datasets": "data.datasets",
    "experiments": "experiments",
    "kernels": "scoring.kernels",
    "metrics": "data.metrics",
    "organisms": "organisms",
    "plots": "reporting.plots",
}

__all__ = [
    "Analyzer",
    "AttentionFlow",
    "AttentionFlowAnalyzer",
    "AttributionAnalyzer",
    "Batch",
    "Condition",
    "ContributionAnalyzer",
    "ConvergenceAnalyzer",
    "DomainAnalyzer",
    "DomainCounts",
    "DomainMatrix",
    "Evaluation",
    "HiddenStates",
    "ImportanceAnalyzer",
    "ImportanceScores",
    "InformationFlow",
    "KindAnalyzer",
    "LensDivergence",
    "LensDivergenceAnalyzer",
    "LogitLens",
    "LogitLensAnalyzer",
    "ModalityLayout",
    "ModelIdentity",
    "NeuronCard",
    "NeuronKinds",
    "NeuronSet",
    "Patching",
    "Point",
    "RankError",
    "Sample",
    "SampleError",
    "Selection",
    "SemanticReach",
    "SemanticReachAnalyzer",
    "TopActivationsAnalyzer",
    "Trials",
    "TunedLens",
    "TunedLensAnalyzer",
    "ablate",
    "ablation_hooks",
    "accuracy",
    "activation_patching",
    "activation_points",
    "answers",
    "attribute",
    "bake",
    "bind",
    "card",
    "check_family",
    "counterfactuals",
    "datasets",
    "domain_matrix",
    "evaluate",
    "experiments",
    "generate",
    "information_flow",
    "inputs",
    "integrated_gradients",
    "kernels",
    "knockout",
    "load",
    "logit_lens",
    "metrics",
    "mine",
    "organisms",
    "pattern_points",
    "plots",
    "report",
    "residual_points",
    "run",
    "scale",
    "trials",
    "unwrap",
    "wrap",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"miner_lens.{_HOMES[name]}"), name)
    if name in _MODULES:
        return importlib.import_module(f"miner_lens.{_MODULES[name]}")
    raise AttributeError(f"module 'miner_lens' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__


registration.register()

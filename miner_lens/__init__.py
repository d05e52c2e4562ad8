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
    from miner_lens import datasets, kernels, organisms, plots
    from miner_lens.ablation import ablate, ablation_hooks
    from miner_lens.analyzer import Analyzer, Batch, run
    from miner_lens.baking import bake
    from miner_lens.distributed import RankError
    from miner_lens.evaluation import accuracy, answers
    from miner_lens.generation import generate, inputs
    from miner_lens.identity import ModelIdentity
    from miner_lens.importance import ImportanceAnalyzer, mine
    from miner_lens.modality import ModalityLayout
    from miner_lens.models import load, wrap
    from miner_lens.neurons import NeuronSet
    from miner_lens.sample import Sample, SampleError
    from miner_lens.scores import ImportanceScores

__version__ = "0.1.0"

_HOMES = {
    "ablate": "ablation",
    "ablation_hooks": "ablation",
    "Analyzer": "analyzer",
    "Batch": "analyzer",
    "run": "analyzer",
    "bake": "baking",
    "RankError": "distributed",
    "accuracy": "evaluation",
    "answers": "evaluation",
    "ModelIdentity": "identity",
    "ImportanceAnalyzer": "importance",
    "mine": "importance",
    "ModalityLayout": "modality",
    "generate": "generation",
    "inputs": "generation",
    "load": "models",
    "wrap": "models",
    "NeuronSet": "neurons",
    "Sample": "sample",
    "SampleError": "sample",
    "ImportanceScores": "scores",
}
_MODULES = ("datasets", "kernels", "organisms", "plots")

__all__ = [
    "Analyzer",
    "Batch",
    "ImportanceAnalyzer",
    "ImportanceScores",
    "ModalityLayout",
    "ModelIdentity",
    "NeuronSet",
    "RankError",
    "Sample",
    "SampleError",
    "ablate",
    "ablation_hooks",
    "accuracy",
    "answers",
    "bake",
    "datasets",
    "generate",
    "inputs",
    "kernels",
    "load",
    "mine",
    "organisms",
    "plots",
    "run",
    "wrap",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"miner_lens.{_HOMES[name]}"), name)
    if name in _MODULES:
        return importlib.import_module(f"miner_lens.{name}")
    raise AttributeError(f"module 'miner_lens' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__


registration.register()

"""What is analysed? Models, and where in them neurons, tokens and attention are."""

from miner_lens.models.binding import bind
from miner_lens.models.bridge import unwrap, wrap
from miner_lens.models.family import FamilyReport, check_family
from miner_lens.models.generation import generate, inputs
from miner_lens.models.identity import ModelIdentity
from miner_lens.models.loading import load
from miner_lens.models.modality import ModalityLayout
from miner_lens.models.points import Point, activation_points, pattern_points, residual_points

__all__ = [
    "FamilyReport",
    "ModalityLayout",
    "ModelIdentity",
    "Point",
    "activation_points",
    "bind",
    "check_family",
    "generate",
    "inputs",
    "load",
    "pattern_points",
    "residual_points",
    "unwrap",
    "wrap",
]

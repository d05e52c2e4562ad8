from __future__ import annotations

from typing import Any

import pytest
import torch

import miner_lens as ml
from tests.checkpoints import REFERENCE


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def shapes() -> Any:
    """The trained organism, on the CPU."""
    return ml.load("shapes", device="cpu")


@pytest.fixture
def tiny() -> Any:
    """The small random reference checkpoint; fresh, because tests change it."""
    if not REFERENCE.is_dir():
        pytest.skip(f"no reference data at {REFERENCE}")
    return ml.load(REFERENCE / "tiny_qwen2_vl", device="cpu")

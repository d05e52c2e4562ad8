from __future__ import annotations

import gc
import os
import shutil
import tempfile
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch

import miner_lens as ml
from tests.reference import REFERENCE


def pytest_configure(config: pytest.Config) -> None:
    """One cache for all processes of a test run, empty at first: a model in it is 540 MB."""
    if not hasattr(config, "workerinput"):
        os.environ["MINER_LENS_CACHE"] = tempfile.mkdtemp(prefix="miner-lens-")


def pytest_unconfigure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):
        shutil.rmtree(os.environ["MINER_LENS_CACHE"], ignore_errors=True)


def pytest_collection_finish() -> None:
    """Whatever was imported stays: no collection of garbage has to look through it again."""
    gc.collect()
    gc.freeze()


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

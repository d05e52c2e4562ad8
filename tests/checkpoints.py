"""The small reference checkpoints and what is expected of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

REFERENCE = Path(__file__).resolve().parents[2] / "shared" / "reference"
MODEL_INPUTS = (
    "input_ids",
    "attention_mask",
    "mm_token_type_ids",
    "pixel_values",
    "image_grid_thw",
    "pixel_values_videos",
    "video_grid_thw",
)


def load_expected(name: str) -> Any:
    path = REFERENCE / name / "expected.npz"
    if not path.is_file():
        pytest.skip(f"no reference data at {path}")
    return np.load(path)

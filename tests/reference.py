"""Where the reference data lies: beside the checkout, or nowhere."""

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
    "input_features",
    "feature_attention_mask",
)


def load(name: str) -> dict[str, Any]:
    """Arrays of one file of the reference data, or a skip where there is none."""
    path = REFERENCE / name
    if not path.exists():
        pytest.skip(f"no reference data at {path}")
    with np.load(path) as arrays:
        return dict(arrays)

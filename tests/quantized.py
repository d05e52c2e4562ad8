"""Ways to quantize a model's linear layers; those whose package is missing skip the test."""

from __future__ import annotations

import tempfile
from typing import Any

import pytest
import torch
from transformers import BitsAndBytesConfig


def by_torch(model: Any) -> Any:
    """With weights that are no parameters."""
    decoder = model.get_decoder()
    torch.ao.quantization.quantize_dynamic(decoder, {torch.nn.Linear}, inplace=True)
    return model


def by_torchao(model: Any) -> Any:
    quantization = pytest.importorskip("torchao.quantization")
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    return model


def by_quanto(model: Any) -> Any:
    quanto = pytest.importorskip("optimum.quanto")
    quanto.quantize(model, weights=quanto.qint8)
    quanto.freeze(model)
    return model


def by_bitsandbytes(model: Any) -> Any:
    pytest.importorskip("bitsandbytes")
    config = BitsAndBytesConfig(load_in_8bit=True)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        loaded = type(model).from_pretrained(
            folder, quantization_config=config, device_map="cpu", dtype=torch.float32
        )
    return loaded.eval()

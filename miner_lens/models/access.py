"""What every floor above asks of a model: its MLPs, its identity and its modality layout.

Everything here takes a `TransformerBridge`, whoever made it, or a plain Hugging Face model, also
inside the wrappers of torch.compile, DistributedDataParallel and PEFT.
"""

from __future__ import annotations

from typing import Any

from miner_lens.models import sites
from miner_lens.models.fingerprint import fingerprint, has_weight
from miner_lens.models.identity import ModelIdentity
from miner_lens.models.inside import bare, hf_model_of, model_name, processor_of
from miner_lens.models.modality import ModalityLayout, layout_for
from miner_lens.models.structure import MLP


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

    The fingerprint is of the whole model, whatever the site, because scores of one part depend on
    the parts before it. It reads each weight matrix in every row and column (of an embedding,
    thousands of them), rounded to bfloat16, so that float32 and bfloat16 copies of a checkpoint
    have the same; float16 rounds once more and may have another. Offloaded weights are read from
    where they are. It is None, so that only shapes are compared, where weights cannot be read: on
    the meta device, quantized (GPTQ, AWQ, bitsandbytes, torchao, quanto), or inside a layer of
    another kind that has no `weight`.

    PEFT adapters that are active and add something are part of it: to try neurons of the base model
    under them, use `NeuronSet.transfer(identity)`. One that is still untrained (B = 0), disabled or
    not active leaves the identity of the base model. What PEFT does outside the layers (prompt
    tuning) is not noticed.

    Raises:
        ValueError: The model has no such site.
    """
    hf_model = hf_model_of(model)
    found = mlps(model, site)
    widths = [mlp.down.in_features for mlp in found]
    readable = all(has_weight(m.before) and has_weight(m.down) for m in found)
    return ModelIdentity(
        name=model_name(model),
        architecture=type(hf_model).__name__,
        layers=len(found),
        neurons=max(widths),
        site=site,
        fingerprint=fingerprint(hf_model) if readable else None,
        widths=tuple(widths),
    )


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

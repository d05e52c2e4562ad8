"""Ablated checkpoints for programs that know nothing of hooks."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard
from torch import Tensor

from miner_lens.models.access import mlps
from miner_lens.models.card import card, code
from miner_lens.models.experts import ExpertProjection
from miner_lens.models.fingerprint import quantization
from miner_lens.models.inside import hf_model_of, model_name, processor_of
from miner_lens.neurons.ablation import Neurons, check_neurons
from miner_lens.neurons.neuron_set import NeuronSet

ABLATED = "ablated_neurons"


def bake(model: Any, neurons: Neurons, path: str | Path) -> Path:
    """Save the model with neurons removed, as an ordinary Hugging Face checkpoint.

    Each neuron's column of the down projection is written as zeros, so that an evaluation harness
    or a serving engine runs the ablated model. Its logits equal those under
    `ablate(model, neurons, value="zero")`. The model itself is not changed.

    Args:
        model: A `TransformerBridge` or a plain Hugging Face model. PEFT adapters are merged into
            the weights that are saved.
        neurons: The neurons, or what `select` returns, which means all of them.
        path: A new or empty folder. Beside the checkpoint it gets the processor, if the model has
            one, a model card, and a folder `ablated_neurons` for `NeuronSet.from_pretrained`; it
            lies apart because loaders take every safetensors file of a checkpoint for weights.

    Returns:
        The folder.

    Raises:
        ValueError: The neurons are another model's, weights are offloaded or quantized, or a PEFT
            adapter cannot be merged into weights.
        FileExistsError: The folder is not empty.
    """
    path = Path(path)
    if path.exists() and any(path.iterdir()):
        raise FileExistsError(f"{path} is not empty; name a new folder to save the checkpoint in.")
    chosen = check_neurons(model, neurons)
    hf_model = hf_model_of(model)
    _refuse_what_is_no_weight(model, hf_model)
    with torch.device("meta"):
        # A copy, because making a model and saving it write into its config.
        baked = type(hf_model)(copy.deepcopy(hf_model.config))
    weights = _weights_for(baked, hf_model)
    names = {id(module): name for name, module in baked.named_modules()}
    layers = mlps(baked, chosen.site)
    for layer, index in chosen.by_layer().items():
        down = layers[layer].down
        if isinstance(down, ExpertProjection):
            name = f"{names[id(down.experts)]}.{down.name}"
            weights[name] = down.without(weights[name], index)
        else:
            name = names[id(down)] + ".weight"
            weights[name] = weights[name].index_fill(1, index.to(weights[name].device), 0)
    baked.load_state_dict(weights, assign=True)
    baked.tie_weights()
    baked.generation_config = copy.deepcopy(hf_model.generation_config)
    baked.save_pretrained(path)
    processor = processor_of(model)
    if processor is not None:
        processor.save_pretrained(path)
    chosen.save_pretrained(path / ABLATED)
    _card(model_name(model), chosen).save(path / "README.md")
    return path


def _card(name: str, neurons: NeuronSet) -> ModelCard:
    about = (
        f"{name or 'This model'} with {len(neurons)} of the {neurons.total} MLP neurons of its "
        f"{neurons.site} switched off: their columns of the down projections are zeros. Everything "
        "else is unchanged. It was made for measuring what these neurons do, with miner-lens "
        "([MINER, arXiv 2410.04819](https://arxiv.org/abs/2410.04819))."
    )
    layers = ["| layer | neurons off |", "|---:|---:|"]
    layers += [f"| {layer} | {count} |" for layer, count in enumerate(neurons.counts())]
    call = (
        "import miner_lens as ml\n\n"
        f'neurons = ml.NeuronSet.from_pretrained("owner/name", subfolder="{ABLATED}")'
    )
    paragraphs = [about, "\n".join(layers), "Which neurons:", code(call, "python")]
    return card(f"{name or 'Model'}, ablated", paragraphs, name, library="transformers")


def _refuse_what_is_no_weight(model: Any, hf_model: Any) -> None:
    """Refuse what would not be in the weights of a plain checkpoint, before anything is written."""
    method = quantization(hf_model)
    if method is not None:
        raise ValueError(
            f"Cannot write zeros into quantized weights ({method}). Bake the model as it is "
            "unquantized, and quantize that checkpoint; or use ml.ablate, which needs no weights."
        )
    for module in model.modules():
        for name, config in getattr(module, "peft_config", {}).items():
            if getattr(config, "is_prompt_learning", False):
                raise ValueError(
                    f"The adapter {name!r} ({config.peft_type.value}) changes no weights, so a "
                    "checkpoint would be without it. Bake model.get_base_model(), and load the "
                    "adapter onto that checkpoint."
                )


def _weights_for(plain: Any, hf_model: Any) -> dict[str, Tensor]:
    """The weights of a model that may be inside a bridge, under the names of a plain one."""
    found = hf_model.state_dict() | _merged(hf_model)
    # A bridge's components stand in the model's tree, and some under a second name as well.
    found = {name.replace("._original_component", ""): tensor for name, tensor in found.items()}
    names = plain.state_dict().keys()
    missing = sorted(names - found.keys())
    if missing:
        raise ValueError(
            f"Cannot save this model as a plain {type(plain).__name__}: it has no {missing[0]}. If "
            "it has PEFT adapters, bake what merge_and_unload() gives."
        )
    weights = {name: found[name] for name in names}
    unreadable = [n for n, t in weights.items() if t.is_meta or not t.is_floating_point()]
    if unreadable:
        raise ValueError(
            f"Cannot save weights that are offloaded or no numbers ({unreadable[0]}, for one). "
            "Load the model whole to bake it."
        )
    return weights


def _merged(hf_model: Any) -> dict[str, Tensor]:
    """Weights of the layers that have PEFT adapters, with what these add to them."""
    weights = {}
    for name, layer in hf_model.named_modules():
        if hasattr(type(layer), "merge") and hasattr(type(layer), "get_base_layer"):
            layer = copy.deepcopy(layer)
            if not layer.disable_adapters:
                try:
                    layer.merge()
                except (ValueError, NotImplementedError, RuntimeError) as error:
                    raise ValueError(
                        f"The PEFT adapter of {name} cannot be merged into a weight ({error}). "
                        "Bake model.get_base_model(), and load the adapter onto that checkpoint."
                    ) from error
            for key, tensor in layer.get_base_layer().state_dict().items():
                weights[f"{name}.{key}"] = tensor
    return weights

"""A TransformerLens adapter for any model whose parts can be read off itself.

Modules get TransformerLens's names where it has one, and keep Hugging Face's where it has none.
Attention and norms stay Hugging Face's own, so that logits do.
"""

from __future__ import annotations

from inspect import signature
from typing import Any

from torch import nn
from transformer_lens.model_bridge.architecture_adapter import ArchitectureAdapter
from transformer_lens.model_bridge.generalized_components import (
    AttentionBridge,
    BlockBridge,
    EmbeddingBridge,
    LinearBridge,
    NormalizationBridge,
    ParallelBlockBridge,
    RMSNormalizationBridge,
    UnembeddingBridge,
)
from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent

from miner_lens.models.structure import (
    GATED,
    Stack,
    attention_name,
    children,
    decoder_of,
    joined,
    mlp_names,
    part,
    plain,
    stacks,
    walk,
)

# What TransformerLens calls a module of a tower.
NAMES = {
    "self_attn": "attn",
    "attention": "attn",
    "feed_forward": "mlp",
    "q_proj": "q",
    "k_proj": "k",
    "v_proj": "v",
    "o_proj": "o",
    "out_proj": "o",
    "gate_proj": "gate",
    "up_proj": "in",
    "down_proj": "out",
    "act_fn": "act",
    "activation_fn": "act",
    "intermediate_act_fn": "act",
    "attention_norm": "ln1",
    "layer_norm1": "ln1",
    "layernorm_before": "ln1",
    "self_attn_layer_norm": "ln1",
    "ffn_norm": "ln2",
    "final_layer_norm": "ln2",
    "layer_norm2": "ln2",
    "layernorm_after": "ln2",
    "layer_norm": "ln_post",
    "post_layernorm": "ln_post",
}
# The norms of a decoder's layer, where the second comes before the MLP and where it comes after
# attention.
NORMS = {"input_layernorm": "ln1", "post_attention_layernorm": "ln2"}
SANDWICHED = {
    "input_layernorm": "ln1",
    "post_attention_layernorm": "ln1_post",
    "pre_feedforward_layernorm": "ln2",
    "post_feedforward_layernorm": "ln2_post",
}
# Where attention and the MLP read the same.
PARALLEL = {"input_layernorm": "ln1"}
FINAL_NORMS = ("norm", "final_layernorm", "final_layer_norm")


class ReadArchitectureAdapter(ArchitectureAdapter):  # type: ignore[misc]
    """Maps a model onto TransformerLens's names, as `miner_lens.models.structure` reads it.

    The decoder has TransformerLens's usual hooks. A tower is `vision_encoder` or `audio_encoder`
    with `blocks.{i}.{ln1,attn,ln2,mlp}`, what projects its output `vision_projector` or
    `audio_projector`. As with all attention that TransformerLens keeps native, `hook_pattern` can
    be read but not edited (TransformerLens warns); edits of `hook_rot_q`, `hook_rot_k` and `hook_z`
    take effect.

    A family's adapter may be a subclass that adds what the model does not say.
    """

    def __init__(self, cfg: Any) -> None:
        super().__init__(cfg)
        self._set_rms_rotary_defaults()
        self._extract_vision_dims(cfg)

    def prepare_model(self, hf_model: Any) -> None:
        """Read the model, which TransformerLens hands over before it asks for components.

        Raises:
            ValueError: Its decoder has a part that is not known.
        """
        found = stacks(hf_model)
        self.cfg.is_multimodal = bool(found)
        self.component_mapping = {**_towers(hf_model), **self._decoder(hf_model)}

    def _decoder(self, hf_model: Any) -> dict[str, GeneralizedComponent]:
        parts = decoder_parts(hf_model)
        blocks = list(children(part(hf_model, parts["blocks"])).values())
        final = part(hf_model, parts["ln_final"])
        return {
            "embed": EmbeddingBridge(name=parts["embed"]),
            "blocks": self._blocks(parts["blocks"], blocks),
            "ln_final": self._norm(parts["ln_final"], final),
            "unembed": UnembeddingBridge(name=parts["unembed"], config=self.cfg),
        }

    def _blocks(self, name: str, blocks: list[Any]) -> GeneralizedComponent:
        parallel = _block_parts(blocks[0])[1] is PARALLEL
        kind = ParallelBlockBridge if parallel else BlockBridge
        return kind(name=name, submodules=self._block(blocks))

    def _block(self, blocks: list[Any]) -> dict[str, GeneralizedComponent]:
        block = blocks[0]
        name, norms, below = *_block_parts(block), children(block)
        attention = part(block, name)
        names = {NAMES.get(n, n): n for n, c in children(attention).items() if _is_linear(c)}
        inside: dict[str, GeneralizedComponent] = {
            ours: LinearBridge(name=theirs) for ours, theirs in names.items()
        }
        for norm in ("q_norm", "k_norm"):
            if norm in children(attention):
                inside[norm] = self._norm(norm, part(attention, norm))
        biased = any(getattr(part(attention, n), "bias", None) is not None for n in names.values())
        if {"q", "k", "v", "o"} <= names.keys():
            self.weight_processing_conversions = self._qkvo_weight_conversions(
                include_biases=biased
            )
        return {
            **{ours: self._norm(theirs, below[theirs]) for theirs, ours in norms.items()},
            "attn": AttentionBridge(
                name=name,
                config=self.cfg,
                submodules=inside,
                maintain_native_attention=True,
                requires_attention_mask=True,
            ),
            **self._mlp([part(one, "mlp") for one in blocks]),
        }

    def _mlp(self, mlps: list[Any]) -> dict[str, GeneralizedComponent]:
        if any(len(signature(mlp.forward).parameters) > 1 for mlp in mlps):
            return {}  # the layer tells it by its class, which a component around it would hide
        names = mlp_names(mlps[0])
        # Whatever it is, as where some layers have experts, it runs as it is, and mining says what
        # it lacks.
        if names is None or any(mlp_names(mlp) != names for mlp in mlps):
            return {"mlp": GeneralizedComponent(name="mlp")}
        gated = self._gated_mlp("mlp")
        if names[1] not in GATED:
            gated = GeneralizedComponent(name="mlp", submodules={"out": LinearBridge(names[2])})
        gated.submodules["act"] = GeneralizedComponent(name=names[0])
        return {"mlp": gated}

    def _norm(self, name: str, norm: Any) -> GeneralizedComponent:
        if getattr(norm, "bias", None) is None:
            return RMSNormalizationBridge(name=name, config=self.cfg)
        return NormalizationBridge(
            name=name, config=self.cfg, use_native_layernorm_autograd=True, uses_rms_norm=False
        )


def decoder_parts(hf_model: Any) -> dict[str, str]:
    """The names of a decoder's parts by those of TransformerLens.

    Raises:
        ValueError: A part is missing, or of a kind that is not known.
    """
    decoder = decoder_of(hf_model)
    named = {id(module): path for path, module in walk(hf_model)}
    below = children(decoder)
    final = next((name for name in FINAL_NORMS if name in below), None)
    head = hf_model.get_output_embeddings()
    known = {
        "layers": "layers" in below,
        "norm after the last layer": final is not None,
        "projection onto the vocabulary": head is not None,
    }
    for what, there in known.items():
        if not there:
            raise ValueError(f"{type(hf_model).__name__} has no {what} that is known.")
    for block in children(below["layers"]).values():
        _block_parts(block)
    return {
        "embed": named[id(plain(hf_model.get_input_embeddings()))],
        "blocks": joined(named[id(decoder)], "layers"),
        "ln_final": joined(named[id(decoder)], str(final)),
        "unembed": named[id(plain(head))],
    }


def _block_parts(block: Any) -> tuple[str, dict[str, str]]:
    """The name of a layer's attention, and those of its norms."""
    below = children(block)
    # Attention that is not by transformers' interface is found by its name, and runs as it is.
    attention = attention_name(block) or next((n for n in below if _is_attention(n)), None)
    norms = SANDWICHED if "pre_feedforward_layernorm" in below else NORMS
    if below.keys().isdisjoint(("post_attention_layernorm", "pre_feedforward_layernorm")):
        norms = PARALLEL
    if attention is None or not {*norms, "mlp"} <= below.keys():
        raise ValueError(
            f"The decoder's {type(block).__name__} has no attention, mlp and norms that are "
            f"known, but {', '.join(below)}."
        )
    return attention, norms


def _is_attention(name: str) -> bool:
    return "att" in name and "norm" not in name


class TowerBlock(GeneralizedComponent):  # type: ignore[misc]
    """One layer of a tower."""

    is_list_item = True

    def __init__(self, name: str, submodules: dict[str, GeneralizedComponent]) -> None:
        super().__init__(name, submodules=submodules)
        parts = [part for part in ("attn", "mlp") if part in submodules]
        self.hook_aliases = {
            "hook_resid_pre": "hook_in",
            "hook_resid_post": "hook_out",
            **{
                f"hook_{part}_{end}": f"{part}.hook_{end}"
                for part in parts
                for end in ("in", "out")
            },
        }


def _towers(hf_model: Any) -> dict[str, GeneralizedComponent]:
    """The components of all that turns media into the decoder's embeddings."""
    found: dict[str, GeneralizedComponent] = {}
    for stack in stacks(hf_model):
        what = "projector" if stack.site == "projector" else "encoder"
        name = f"{_medium(stack.modalities)}_{what}"
        found[name] = GeneralizedComponent(
            name=stack.module, submodules=tower_parts(hf_model, stack)
        )
    towers = [stack.module for stack in stacks(hf_model)]
    if towers and not any(name.endswith("projector") for name in found):
        # A projector without neurons, which stands beside the tower.
        beside = towers[0].rpartition(".")[0]
        media = tuple(m for stack in stacks(hf_model) for m in stack.modalities)
        for name, child in children(part(hf_model, beside)).items():
            path = joined(beside, name)
            if path not in towers and ("project" in name or "connector" in name):
                below = _components(child, "")
                component = LinearBridge(path) if _is_linear(child) else None
                found[f"{_medium(media)}_projector"] = component or GeneralizedComponent(
                    name=path, submodules=below
                )
    return found


def _medium(modalities: tuple[str, ...]) -> str:
    return "audio" if modalities == ("audio",) else "vision"


def tower_parts(hf_model: Any, stack: Stack) -> dict[str, GeneralizedComponent]:
    """The components of a tower: its blocks, and what stands before and after them."""
    tower, first = part(hf_model, stack.module), stack.layers[0].activation
    if stack.blocks is None:
        return _components(tower, first.removeprefix(f"{stack.module}."))
    apart = [other.module for other in stacks(hf_model) if other is not stack]
    blocks = stack.blocks.removeprefix(f"{stack.module}.")
    number, block = next(iter(children(part(hf_model, stack.blocks)).items()))
    act = first.removeprefix(f"{joined(stack.blocks, number)}.")
    beside = {
        NAMES.get(name, name): _component(name, child)
        for name, child in children(tower).items()
        if _is_called(child)
        and blocks.partition(".")[0] != name
        and joined(stack.module, name) not in apart
    }
    return {**beside, "blocks": TowerBlock(blocks, _components(block, act))}


def _components(module: Any, act: str) -> dict[str, GeneralizedComponent]:
    """Components for all that is below a module.

    Args:
        module: The module.
        act: The name of the activation function whose output is X, from this module.
    """
    found: dict[str, GeneralizedComponent] = {}
    for name, child in children(module).items():
        inner = act.removeprefix(f"{name}.") if act.startswith(f"{name}.") else ""
        if name == act:
            found["act"] = _component(name, child)
        elif isinstance(child, nn.Sequential) and inner:  # its modules have numbers for names
            for ours, theirs in zip(("act", "fc1", "fc2"), mlp_names(child) or (), strict=True):
                found[ours] = _component(joined(name, theirs), part(child, theirs))
        elif _is_called(child):
            below = {} if _is_linear(child) else _components(child, inner)
            found[NAMES.get(name, name)] = _component(name, child, below)
    return found


def _component(
    name: str, module: Any, below: dict[str, GeneralizedComponent] | None = None
) -> GeneralizedComponent:
    if _is_linear(module):
        return LinearBridge(name=name, optional=True)
    return GeneralizedComponent(name=name, submodules=below or {}, optional=True)


def _is_linear(module: Any) -> bool:
    return hasattr(module, "in_features")


def _is_called(module: Any) -> bool:
    """Whether a module is one that is called, as one of which only weights are used is not."""
    has_weights = next(module.parameters(), None) is not None
    return has_weights and not isinstance(module, nn.Embedding | nn.ModuleList)

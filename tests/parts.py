"""Eighteen families of models, and where in each of them neurons are, written by hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

from transformers import PretrainedConfig

from miner_lens.models.modality import MEDIA, ModalityLayout
from tests.families import (
    Made,
    gemma3,
    gemma4,
    instructblip,
    internvl,
    llama,
    llava,
    llava_next,
    llava_onevision,
    mistral3,
    paligemma,
    phi4_multimodal,
    qwen2_5_omni,
    qwen2_5_vl,
    qwen2_audio,
    qwen2_vl,
    qwen3_vl,
    smolvlm,
    voxtral,
)


@dataclass(frozen=True)
class Part:
    """Where neurons are, written by hand: names from the model, and from each layer.

    Attributes:
        layers: The list of layers, or the names of each; None: one MLP.
        activation, attention, down: Of a layer.
        items: In each call, its modality and (sample, rows) of each item, in order.
        padding: Rows of the call's heap that are padding.
    """

    layers: str | tuple[str, ...] | None
    activation: str
    attention: str | None
    down: str
    items: tuple[tuple[str, tuple[tuple[int, int], ...]], ...] = ()
    padding: tuple[int, ...] = ()


@dataclass(frozen=True)
class Family:
    """A tiny model with inputs, and where in it neurons are."""

    make: Callable[[], Made]
    parts: dict[str, Part]


def _siglip(layers: str, *items: Any, act: str = "mlp.activation_fn", **more: Any) -> Part:
    return Part(layers, act, "self_attn", "mlp.fc2", items, **more)


def _grid(down: str, act: str, *items: Any) -> dict[str, Part]:
    vision = Part("model.visual.blocks", act, "attn", down, items)
    merged = tuple((name, tuple((s, n // 4) for s, n in each)) for name, each in items)
    merger = Part(None, "model.visual.merger.mlp.1", None, "model.visual.merger.mlp.2", merged)
    return {"vision": vision, "projector": merger}


def _linear(*items: Any, down: str = "linear_2") -> Part:
    projector = "model.multi_modal_projector"
    return Part(None, f"{projector}.act", None, f"{projector}.{down}", items)


def _whisper(*items: Any, **more: Any) -> Part:
    return Part("model.audio_tower.layers", "activation_fn", "self_attn", "fc2", items, **more)


LLM = Part("model.language_model.layers", "mlp.act_fn", "self_attn", "mlp.down_proj")
TOWER = "model.vision_tower.encoder.layers"
THREE = ((0, 4), (0, 4), (2, 4))
GRIDS = (("image", ((0, 16), (0, 12), (2, 4))), ("video", ((2, 16),)))
GATED = ("mlp.down_proj", "mlp.act_fn")
OMNI = ("image", ((0, 16), (2, 12)))
PATCHES = ("image", ((0, 8), (0, 4), (2, 16)))

FAMILIES: dict[str, Family] = {
    "llava": Family(
        llava,
        {
            "llm": LLM,
            # With a class token, which does not reach the projector.
            "vision": _siglip(TOWER, ("image", ((0, 5), (0, 5), (2, 5)))),
            "projector": _linear(("image", THREE)),
        },
    ),
    "llava_next": Family(
        llava_next,
        {
            "llm": LLM,
            "vision": _siglip(TOWER, ("image", ((0, 3 * 5), (2, 5 * 5)))),
            "projector": _linear(("image", ((0, 3 * 4), (2, 5 * 4)))),
        },
    ),
    "llava_onevision": Family(
        llava_onevision,
        {
            "llm": LLM,
            "vision": _siglip(TOWER, ("image", ((0, 12), (2, 20))), ("video", ((1, 8),))),
            "projector": _linear(("image", ((0, 12), (2, 20))), ("video", ((1, 8),))),
        },
    ),
    "instructblip": Family(
        instructblip,
        {
            "llm": replace(LLM, layers="language_model.model.layers"),
            "vision": _siglip("vision_model.encoder.layers", ("image", ((0, 5), (1, 5)))),
            "projector": Part(
                "qformer.encoder.layer",
                "intermediate_query.intermediate_act_fn",
                None,
                "output_query.dense",
                (("image", ((0, 4), (1, 4))),),
            ),
        },
    ),
    "qwen2_vl": Family(qwen2_vl, {"llm": LLM, **_grid("mlp.fc2", "mlp.act", *GRIDS)}),
    "qwen2_5_vl": Family(qwen2_5_vl, {"llm": LLM, **_grid(*GATED, *GRIDS)}),
    "qwen3_vl": Family(
        qwen3_vl,
        {
            "llm": LLM,
            **_grid("mlp.linear_fc2", "mlp.act_fn", *GRIDS),
            # The merger, and that of DeepStack after the first block.
            "projector": replace(
                _grid("", "", *GRIDS)["projector"],
                layers=("model.visual.merger", "model.visual.deepstack_merger_list.0"),
                activation="act_fn",
                down="linear_fc2",
            ),
        },
    ),
    "gemma3": Family(gemma3, {"llm": LLM, "vision": _siglip(TOWER, ("image", THREE))}),
    "gemma4": Family(
        gemma4,
        {
            "llm": LLM,
            "vision": Part(
                TOWER,
                "mlp.act_fn",
                "self_attn",
                "mlp.down_proj.linear",
                (("image", ((0, 16), (0, 16), (2, 16))),),
            ),
        },
    ),
    "paligemma": Family(paligemma, {"llm": LLM, "vision": _siglip(TOWER, ("image", THREE))}),
    "internvl": Family(
        internvl,
        {
            "llm": LLM,
            "vision": replace(
                _siglip("model.vision_tower.encoder.layer", ("image", ((0, 5), (0, 5), (2, 5)))),
                attention="attention",
            ),
            "projector": _linear(("image", ((0, 1), (0, 1), (2, 1)))),
        },
    ),
    "smolvlm": Family(
        smolvlm,
        {
            "llm": replace(LLM, layers="model.text_model.layers"),
            "vision": _siglip(
                "model.vision_model.encoder.layers", ("image", THREE), padding=(5, 7)
            ),
        },
    ),
    "mistral3": Family(
        mistral3,
        {
            "llm": LLM,
            "vision": Part(
                "model.vision_tower.transformer.layers",
                "feed_forward.act_fn",
                "attention",
                "feed_forward.down_proj",
                (PATCHES,),
            ),
            "projector": _linear(("image", ((0, 2), (0, 1), (2, 4)))),
        },
    ),
    "voxtral": Family(
        voxtral,
        {
            "llm": LLM,
            "audio": _whisper(("audio", ((0, 20), (0, 20), (2, 20)))),
            "projector": _linear(("audio", ((0, 5), (0, 5), (2, 5)))),
        },
    ),
    "qwen2_audio": Family(
        qwen2_audio,
        {
            "llm": LLM,
            "audio": _whisper(
                ("audio", ((0, 20), (0, 20), (2, 20))),
                padding=(*range(27, 40), *range(51, 60)),
            ),
        },
    ),
    "qwen2_5_omni": Family(
        qwen2_5_omni,
        {
            "llm": LLM,
            "audio": _whisper(("audio", ((0, 20), (2, 7)))),
            **_grid(*GATED, OMNI),
        },
    ),
    "phi4_multimodal": Family(
        phi4_multimodal,
        {"llm": replace(LLM, layers="model.layers", activation="mlp.activation_fn")},
    ),
    "llama": Family(llama, {"llm": replace(LLM, layers="model.layers")}),
}


def reader_of(processor: Any) -> Any:
    """Return the stand-in for a model of which nothing but its processor is used."""
    tokenizer = getattr(processor, "tokenizer", processor)
    tokens = {kind: getattr(processor, f"{kind}_token", None) for kind in MEDIA}
    media = {
        kind: tokenizer.convert_tokens_to_ids(str(token)) for kind, token in tokens.items() if token
    }
    layout = ModalityLayout(media, frozenset())
    return SimpleNamespace(processor=processor, modality_layout=layout, config=PretrainedConfig())

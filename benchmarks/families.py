"""Which families can be read: a small random model of each, and what was found, held and refused.

`python -m benchmarks.families` builds the models, from a few numbers and without a hub, and prints
the table of docs/families.md. Of each it compares with plain Hugging Face: the logits; X of the
decoder by the definition (its mean over a prompt's tokens), at the activation function that is
named here by hand; and logits with a third of the neurons off, with zeroed columns of the down
projection. Towers are scored where the row has inputs for them.
"""

from __future__ import annotations

import argparse
import copy
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers.utils import logging

import miner_lens as ml
from miner_lens.models.description import ModelDescription, SiteDescription, describe
from miner_lens.models.structure import plain
from miner_lens.scoring import kernels

IMAGE, VIDEO, AUDIO = 90, 91, 94
TEXT: dict[str, Any] = {
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.2,
}
VISION: dict[str, Any] = {
    "hidden_size": 20,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 5,
    "image_size": 8,
    "patch_size": 4,
    "initializer_range": 0.2,
}
GRID: dict[str, Any] = {"depth": 3, "num_heads": 5, "patch_size": 2, "temporal_patch_size": 2}
GRID |= {"spatial_merge_size": 2, "hidden_size": 20, "intermediate_size": 40, "out_hidden_size": 32}
EXPERTS: dict[str, Any] = {"num_experts_per_tok": 2, "moe_intermediate_size": 24}
ROPE: dict[str, Any] = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [2, 1, 1]}


@dataclass(frozen=True)
class Family:
    """A family, and where its decoder's neurons are, written by hand.

    Attributes:
        name: Class name of the model.
        config: Of a small model.
        layers: The list of the decoder's layers.
        activation: The activation function, from a layer; a layer without it is not compared.
        down: The linear layer after it, from a layer.
        tokens: How many placeholder tokens the inputs of a tower fill.
        inputs: What a tower takes, as shapes.
        always: Whether the model takes no prompt without an image.
    """

    name: str
    config: dict[str, Any]
    layers: str = "model.language_model.layers"
    activation: str = "mlp.act_fn"
    down: str = "mlp.down_proj"
    tokens: int = 0
    inputs: dict[str, tuple[int, ...]] = field(default_factory=dict)
    always: bool = False


def text(kind: str = "llama", **options: Any) -> dict[str, Any]:
    """A decoder's config."""
    return TEXT | {"model_type": kind} | options


PIXELS: dict[str, tuple[int, ...]] = {"pixel_values": (1, 3, 8, 8)}
CLIP: dict[str, Any] = VISION | {"model_type": "clip_vision_model", "projection_dim": 20}
SIGLIP: dict[str, Any] = VISION | {"model_type": "siglip_vision_model", "vision_use_head": False}
BOTH: dict[str, Any] = {"image_token_id": IMAGE, "video_token_id": VIDEO}

FAMILIES = [
    Family("Phi3ForCausalLM", TEXT, "model.layers", "mlp.activation_fn"),
    Family("Glm4ForCausalLM", TEXT, "model.layers", "mlp.activation_fn"),
    Family("GptOssForCausalLM", TEXT | {"num_local_experts": 4}, "model.layers", ""),
    Family(
        "Llama4ForCausalLM",
        TEXT
        | {"num_local_experts": 4, "intermediate_size_mlp": 96, "interleave_moe_layer_step": 2},
        "model.layers",
        "feed_forward.activation_fn",
        "feed_forward.down_proj",
    ),
    Family(
        "DeepseekV3ForCausalLM",
        TEXT
        | {"first_k_dense_replace": 1, "moe_intermediate_size": 24, "n_routed_experts": 4}
        | {"n_group": 1, "topk_group": 1, "num_experts_per_tok": 2, "num_key_value_heads": 4}
        | {"q_lora_rank": 8, "kv_lora_rank": 8, "v_head_dim": 8}
        | {"qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "head_dim": 4},
        "model.layers",
    ),
    Family(
        "Llama4ForConditionalGeneration",
        {
            "text_config": TEXT
            | {"num_local_experts": 4, "intermediate_size_mlp": 96, "interleave_moe_layer_step": 2},
            "vision_config": VISION
            | {"vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32},
            "image_token_index": IMAGE,
        },
        "language_model.model.layers",
        "feed_forward.activation_fn",
        "feed_forward.down_proj",
        1,
        PIXELS,
    ),
    Family(
        "Idefics2ForConditionalGeneration",
        {
            "text_config": text("mistral"),
            "vision_config": VISION,
            "perceiver_config": {
                "hidden_size": 32,
                "resampler_n_latents": 3,
                "resampler_depth": 2,
                "resampler_n_heads": 4,
                "resampler_head_dim": 8,
                "num_key_value_heads": 2,
            },
            "image_token_id": IMAGE,
        },
        "model.text_model.layers",
        tokens=3,
        inputs={"pixel_values": (1, 1, 3, 8, 8)},
    ),
    Family(
        "Idefics3ForConditionalGeneration",
        {"text_config": text(), "vision_config": VISION, "image_token_id": IMAGE},
        "model.text_model.layers",
        tokens=1,
        inputs={"pixel_values": (1, 1, 3, 8, 8)},
    ),
    Family(
        "LlavaNextVideoForConditionalGeneration",
        {
            "text_config": text(),
            "vision_config": CLIP,
            "image_token_index": IMAGE,
            "video_token_index": VIDEO,
            "image_grid_pinpoints": [[8, 16], [16, 8]],
        },
    ),
    Family(
        "VipLlavaForConditionalGeneration",
        {
            "text_config": text(),
            "vision_config": CLIP,
            "image_token_index": IMAGE,
            "vision_feature_layers": [-1, -2],
        },
        tokens=4,
        inputs=PIXELS,
    ),
    Family(
        "VideoLlavaForConditionalGeneration",
        {
            "text_config": text(),
            "vision_config": CLIP,
            "image_token_index": IMAGE,
            "video_token_index": VIDEO,
        },
    ),
    Family(
        "Ovis2ForConditionalGeneration",
        {
            "text_config": text("qwen2"),
            "vision_config": VISION | {"hidden_stride": 1, "vocab_size": 12},
            "image_token_id": IMAGE,
            "visual_indicator_token_ids": [95, 96, 97, 98, 99],
            "hidden_size": 32,
            "vocab_size": 100,
        },
        tokens=4,
        inputs=PIXELS,
    ),
    Family(
        "AyaVisionForConditionalGeneration",
        {
            "text_config": text("cohere2"),
            "vision_config": SIGLIP,
            "image_token_id": IMAGE,
            "downsample_factor": 2,
        },
        tokens=1,
        inputs=PIXELS,
    ),
    Family(
        "Cohere2VisionForConditionalGeneration",
        {
            "text_config": text("cohere2"),
            "vision_config": SIGLIP,
            "image_token_id": IMAGE,
            "alignment_intermediate_size": 16,
        },
        tokens=1,
        inputs=PIXELS,
    ),
    Family(
        "Blip2ForConditionalGeneration",
        {
            "text_config": text(),
            "vision_config": VISION,
            "qformer_config": {
                "hidden_size": 24,
                "intermediate_size": 40,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
            },
            "num_query_tokens": 4,
            "image_token_index": IMAGE,
        },
        "language_model.model.layers",
        tokens=4,
        inputs=PIXELS,
        always=True,
    ),
    Family(
        "Emu3ForConditionalGeneration",
        {
            "text_config": TEXT,
            "vq_config": {
                "codebook_size": 8,
                "embed_dim": 4,
                "z_channels": 4,
                "base_channels": 32,
                "hidden_size": 32,
                "channel_multiplier": [1, 1],
                "num_res_blocks": 1,
                "attn_resolutions": [],
            },
            "vocabulary_map": {"<image>": IMAGE},
        },
        "model.text_model.layers",
    ),
    Family(
        "GotOcr2ForConditionalGeneration",
        {
            "text_config": text("qwen2"),
            "vision_config": {
                "hidden_size": 20,
                "mlp_dim": 40,
                "output_channels": 8,
                "num_hidden_layers": 3,
                "num_attention_heads": 5,
                "image_size": 64,
                "patch_size": 4,
                "window_size": 2,
                "global_attn_indexes": [1],
            },
            "image_token_index": IMAGE,
        },
        tokens=16,
        inputs={"pixel_values": (1, 3, 64, 64)},
    ),
    Family(
        "JanusForConditionalGeneration",
        {
            "text_config": text(),
            "vision_config": VISION | {"projection_dim": 32, "depth": 2},
            "vq_config": {
                "embed_dim": 4,
                "num_embeddings": 8,
                "latent_channels": 4,
                "base_channels": 32,
                "channel_multiplier": [1],
                "num_res_blocks": 1,
                "num_patches": 2,
                "projection_dim": 32,
                "image_token_embed_dim": 32,
            },
            "image_token_id": IMAGE,
        },
        tokens=4,
        inputs=PIXELS,
    ),
    Family(
        "Gemma3nForConditionalGeneration",
        {
            "text_config": TEXT
            | {
                "vocab_size_per_layer_input": 100,
                "hidden_size_per_layer_input": 8,
                "num_kv_shared_layers": 0,
                "laurel_rank": 4,
                "altup_num_inputs": 2,
                "layer_types": ["sliding_attention", "full_attention"],
                "activation_sparsity_pattern": [0.0, 0.0],
                "intermediate_size": [48, 48],
            },
        },
    ),
    Family(
        "Glm4vForConditionalGeneration",
        {
            "text_config": TEXT | {"rope_parameters": ROPE},
            "vision_config": GRID | {"image_size": 8},
            **BOTH,
        },
        activation="mlp.activation_fn",
    ),
    Family(
        "Glm4vMoeForConditionalGeneration",
        {
            "text_config": TEXT
            | EXPERTS
            | {"n_routed_experts": 4, "first_k_dense_replace": 1}
            | {"rope_parameters": ROPE | {"partial_rotary_factor": 1.0}},
            "vision_config": GRID | {"image_size": 8},
            **BOTH,
        },
    ),
    Family(
        "Ernie4_5_VLMoeForConditionalGeneration",
        {
            "text_config": TEXT
            | {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": [24, 12]}
            | {"mlp_layer_types": ["dense", "sparse"]}
            | {"rope_parameters": ROPE | {"mrope_section": [1, 1, 2]}},
            "vision_config": GRID,
            **BOTH,
        },
    ),
    Family(
        "Qwen3OmniMoeThinkerForConditionalGeneration",
        {
            "text_config": TEXT | EXPERTS | {"num_experts": 4, "rope_parameters": ROPE},
            "vision_config": GRID
            | {"num_position_embeddings": 64, "deepstack_visual_indexes": [0]},
            "audio_config": {
                "d_model": 20,
                "encoder_layers": 3,
                "encoder_attention_heads": 5,
                "encoder_ffn_dim": 40,
                "num_mel_bins": 8,
                "output_dim": 32,
                "downsample_hidden_size": 4,
            },
            "audio_token_id": AUDIO,
            "vision_start_token_id": 92,
            **BOTH,
        },
        "model.layers",
        "",
    ),
    Family(
        "GraniteSpeechForConditionalGeneration",
        {
            "text_config": text("granite"),
            "encoder_config": {
                "input_dim": 8,
                "num_layers": 3,
                "hidden_dim": 20,
                "feedforward_mult": 2,
                "num_heads": 5,
                "dim_head": 4,
                "output_dim": 8,
                "context_size": 10,
            },
            "projector_config": {
                "model_type": "blip_2_qformer",
                "hidden_size": 20,
                "intermediate_size": 40,
                "num_hidden_layers": 2,
                "num_attention_heads": 5,
                "encoder_hidden_size": 20,
            },
            "audio_token_index": AUDIO,
            "has_lora_adapter": False,
        },
    ),
    Family(
        "AudioFlamingo3ForConditionalGeneration",
        {
            "text_config": text("qwen2"),
            "audio_config": {
                "hidden_size": 20,
                "intermediate_size": 40,
                "num_hidden_layers": 3,
                "num_attention_heads": 5,
                "num_mel_bins": 8,
                "max_source_positions": 20,
            },
            "audio_token_id": AUDIO,
        },
    ),
    Family(
        "PerceptionLMForConditionalGeneration",
        {
            "text_config": text(),
            "vision_config": {
                "architecture": "vit_pe_core_large_patch14_336",
                "model_args": {"embed_dim": 20, "img_size": [28, 28], "depth": 3, "num_heads": 5}
                | {"global_pool": ""},
            },
            "image_token_id": IMAGE,
            "video_token_id": VIDEO,
        },
    ),
    Family(
        "Lfm2VlForConditionalGeneration",
        {
            "text_config": text(
                "lfm2", layer_types=["conv", "full_attention"], block_auto_adjust_ff_dim=False
            ),
            "vision_config": VISION | {"model_type": "siglip2_vision_model", "num_patches": 16},
            "image_token_id": IMAGE,
        },
        activation="feed_forward.w1",
    ),
]


@dataclass
class Row:
    """What came of a family."""

    name: str
    sites: str = ""
    logits: str = ""
    scores: str = ""
    off: str = ""
    towers: str = ""
    refused: str = ""

    def cells(self) -> list[str]:
        """As a table has them."""
        name = self.name.removesuffix("ForConditionalGeneration").removesuffix("ForCausalLM")
        return [name, self.sites, self.logits, self.scores, self.off, self.towers, self.refused]


def build(family: Family) -> Any:
    """A small random model.

    Args:
        family: Of which.
    """
    torch.manual_seed(0)
    kind: Any = getattr(transformers, family.name)
    model = kind(kind.config_class(**copy.deepcopy(family.config))).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # biases and norms, which are 0 and 1 at first
                parameter.add_(0.1 * torch.randn_like(parameter))
            elif parameter.numel() > 1 and parameter.std() < 0.05:
                parameter.normal_(0, 0.2)
    return model


def try_family(family: Family) -> Row:
    """Build it, read it, and hold it against plain Hugging Face."""
    row = Row(family.name)
    try:
        model = build(family)
    except Exception as error:
        row.refused = f"no small model could be built here: {_short(error)}"
        return row
    untouched, fails = copy.deepcopy(model), ""
    try:
        _logits(model, _prompt(family))
    except Exception as error:
        fails = f"plain transformers does not run it: {_short(error)}"
    try:
        bridge = ml.wrap(model)
        found = describe(bridge)
        row.sites = ", ".join(f"{s.name} {s.layers} x {s.per_layer}" for s in found.sites)
        row.refused = _what_is_missing(found)
        row.refused = "; ".join(filter(None, [row.refused, fails]))
        if not fails:
            _compare(family, untouched, bridge, found, row)
    except Exception as error:
        row.refused = "; ".join(filter(None, [row.refused, _short(error)]))
    return row


def _compare(
    family: Family, untouched: Any, bridge: Any, found: ModelDescription, row: Row
) -> None:
    prompt = _prompt(family)
    ours = _logits(bridge.original_model, prompt)
    row.logits = _difference(ours, _logits(untouched, prompt))
    here = {site.name: site for site in found.sites}
    if "llm" in here:
        data = [(prompt, {"text": prompt["attention_mask"].bool()})]
        scores = ml.mine(bridge, data, progress=False, metrics=_metrics(here["llm"]))
        row.scores = _twin(family, untouched, prompt, scores)
        neurons = ml.NeuronSet.from_mask(scores.exists & _third(scores.exists), scores.identity)
        with ml.ablate(bridge, neurons):
            cut = _logits(bridge.original_model, prompt)
        row.off = _difference(cut, _zeroed(family, untouched, prompt)) if family.activation else ""
    if family.inputs:
        row.towers = ", ".join(_towers(family, untouched, bridge, found))


def _towers(family: Family, untouched: Any, bridge: Any, found: ModelDescription) -> Iterator[str]:
    """The sites besides the decoder that an image could be scored in."""
    inputs = _with_image(family)
    same = _difference(_logits(bridge.original_model, inputs), _logits(untouched, inputs))
    yield f"logits {same}"
    for site in found.sites:
        if site.name != "llm":
            data = [(inputs, {"prompt": inputs["attention_mask"].bool()})]
            metrics = _metrics(site)
            scores = ml.mine(bridge, data, progress=False, site=site.name, metrics=metrics)
            yield f"{site.name} scored" if scores.values.any() else f"{site.name} scores 0"


def _metrics(site: SiteDescription) -> tuple[str, ...]:
    """All of MINER's, or those without attention where it cannot be read."""
    readable = site.attention or site.name == "projector"
    return kernels.METRICS if readable else ("prob", "mean", "max")


def _prompt(family: Family) -> dict[str, Any]:
    """Text, or an image too where the model wants one."""
    ids = torch.arange(5, 17)[None]
    alone = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return _with_image(family) if family.always else alone


def _with_image(family: Family) -> dict[str, Any]:
    torch.manual_seed(1)
    ids = torch.tensor([[5, 6, *[IMAGE] * family.tokens, 7, 8]])
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return inputs | {name: torch.rand(*shape) for name, shape in family.inputs.items()}


def _third(exists: Tensor) -> Tensor:
    every = torch.zeros_like(exists)
    every[:, ::3] = True
    return every


def _twin(family: Family, untouched: Any, prompt: dict[str, Any], scores: Any) -> str:
    """The largest difference of mean activations, by hooks of torch on the plain model."""
    if not family.activation:
        return "experts: see tests"
    seen: dict[int, Tensor] = {}
    handles = []
    for number, layer in enumerate(untouched.get_submodule(family.layers)):
        module = _sub(layer, family.activation)
        if module is not None:

            def keep(_: Any, __: Any, x: Tensor, number: int = number) -> None:
                seen[number] = x.flatten(0, -2).mean(0)

            handles.append(module.register_forward_hook(keep))
    _logits(untouched, prompt)
    for handle in handles:
        handle.remove()
    means = scores.means[0]
    pairs = [(means[n, : x.shape[-1]], x) for n, x in seen.items()]
    return _difference(torch.cat([a for a, _ in pairs]), torch.cat([b for _, b in pairs]))


def _zeroed(family: Family, untouched: Any, prompt: dict[str, Any]) -> Tensor:
    edited = copy.deepcopy(untouched)
    for layer in edited.get_submodule(family.layers):
        down, experts = _sub(layer, family.down), _experts(layer)
        if down is not None:
            down.weight.data[:, ::3] = 0
        elif experts is not None:
            of_units = experts.down_proj.data
            if not getattr(experts, "is_transposed", True):
                of_units = of_units.transpose(1, 2)
            count, units = of_units.shape[:2]
            for neuron in range(0, count * units, 3):
                of_units[neuron // units, neuron % units] = 0
    return _logits(edited, prompt)


def _experts(layer: Any) -> Any:
    return next((m for name, m in layer.named_modules() if name.endswith("experts")), None)


def _sub(layer: Any, path: str) -> Any:
    for name in path.split("."):
        layer = getattr(plain(layer), name, None)
    return layer


def _logits(model: Any, inputs: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(**inputs).logits
    return found


def _difference(ours: Tensor, theirs: Tensor) -> str:
    return f"{(ours - theirs).abs().max().item():.0e}" if not torch.equal(ours, theirs) else "0"


def _what_is_missing(found: ModelDescription) -> str:
    known = [one for one in found.missing if "rebuilds" not in one]
    return "; ".join(one.split(". ")[0].rstrip(".") for one in known)


def _short(error: Exception) -> str:
    said = (str(error) or type(error).__name__).replace("\n", " ").strip()
    return said.rpartition("it cannot be read off the model: ")[2].split(". ")[0][:200].strip()


HEAD = ["family", "layers x neurons", "logits", "X", "off", "with an image", "what is missing"]


def markdown(rows: Sequence[Row]) -> str:
    """The table of docs/families.md."""
    lines = [HEAD, ["---"] * len(HEAD), *(row.cells() for row in rows)]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in one)} |" for one in lines)


def main() -> None:
    """Try every family, or some, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="Parts of class names; default all.")
    parser.add_argument("--out", type=Path, help="A file for the table, instead of printing it.")
    options = parser.parse_args()
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    warnings.simplefilter("ignore")
    wanted = [f for f in FAMILIES if not options.names or any(n in f.name for n in options.names)]
    table = markdown([try_family(family) for family in wanted])
    print(table) if options.out is None else options.out.write_text(table + "\n")


if __name__ == "__main__":
    main()

"""Qwen2-VL: text decoder, vision tower and merger as TransformerLens components.

Checked against `Qwen2VLForConditionalGeneration` of transformers 5.23. The vision block has
two LayerNorms and a plain fc1-act-fc2 MLP, so TransformerLens's Qwen2.5-VL adapter (RMS norms,
gated MLP) does not fit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from einops import rearrange
from torch import Tensor
from transformer_lens.model_bridge.generalized_components import VisionProjectionBridge
from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent
from transformer_lens.model_bridge.generalized_components.qwen3_5_vision_encoder import (
    Qwen3_5VisionBlockBridge,
    Qwen3_5VisionEncoderBridge,
)

from miner_lens.models.modality import ModalityLayout
from miner_lens.models.sites import MLP, Rotary, Rows, Site, Tower, plain
from miner_lens_adapters.components import plain_mlp
from miner_lens_adapters.decoder import QwenDecoderAdapter, chat_delimiters


class Qwen2VLArchitectureAdapter(QwenDecoderAdapter):
    """Maps `Qwen2VLForConditionalGeneration` onto TransformerLens's names.

    Beside the decoder's hooks there are
    `vision_encoder.blocks.{i}.{norm1,attn.qkv,attn.proj,norm2,mlp.fc1,mlp.act,mlp.fc2}` and
    `vision_projector.{ln_q,fc1,act,fc2}` (the merger).
    """

    required_libraries = ["torchvision"]  # noqa: RUF012 (TransformerLens's own declaration)
    required_libraries_group = "multimodal"

    def __init__(self, cfg: Any) -> None:
        super().__init__(cfg)
        self._extract_vision_dims(cfg)

    def towers(self) -> dict[str, GeneralizedComponent]:
        """The vision tower and the merger, which projects patches into the decoder."""
        mlp = GeneralizedComponent(name="mlp", submodules=plain_mlp("fc1", "act", "fc2"))
        return {
            "vision_encoder": Qwen3_5VisionEncoderBridge(
                name="model.visual",
                config=self.cfg,
                submodules={
                    "pos_embed": GeneralizedComponent(name="rotary_pos_emb"),
                    "blocks": Qwen3_5VisionBlockBridge(name="blocks", submodules={"mlp": mlp}),
                },
            ),
            "vision_projector": VisionProjectionBridge(
                name="model.visual.merger",
                submodules={
                    "ln_q": GeneralizedComponent(name="ln_q"),
                    **plain_mlp("mlp.0", "mlp.1", "mlp.2"),
                },
            ),
        }


def modality_layout(config: Any, tokenizer: Any = None) -> ModalityLayout:
    """Read Qwen2-VL's placeholder and delimiter tokens from its config and tokenizer."""
    special = {config.vision_start_token_id, config.vision_end_token_id}
    media = {"image": config.image_token_id, "video": config.video_token_id}
    return ModalityLayout(media, frozenset(special | chat_delimiters(tokenizer)))


GRIDS = {"image": "image_grid_thw", "video": "video_grid_thw"}


class VisionTower(Tower):
    """The neurons of the vision transformer, between `fc1` and `fc2`: rows are patches."""

    name = "vision"
    modalities = ("image", "video")

    def mlps(self, hf_model: Any) -> list[MLP]:
        """One per block."""
        blocks = self.module(hf_model).blocks
        return [MLP(plain(block.mlp.act), block.mlp.fc1, block.mlp.fc2) for block in blocks]

    def activation_point(self, layer: int) -> str:
        """TransformerLens hook point of a layer's X, [patch neuron]."""
        return f"vision_encoder.blocks.{layer}.mlp.act.hook_out"

    def attention_points(self, layer: int) -> tuple[str, ...]:
        """Queries, keys and values in one, before rotary embedding."""
        return (f"vision_encoder.blocks.{layer}.attn.qkv.hook_out",)

    def rotary(
        self, hf_model: Any, inputs: Mapping[str, Any], modality: str, device: torch.device
    ) -> Rotary | None:
        """By the row and the column of each patch."""
        from transformers.vision_utils import get_vision_position_ids

        grid = inputs[GRIDS[modality]].to(device)
        side = hf_model.config.vision_config.spatial_merge_size
        positions = get_vision_position_ids(grid, side)
        rotary: Rotary = plain(self.module(hf_model).rotary_pos_emb)(grid, positions)
        return rotary

    def queries_and_keys(
        self, hf_model: Any, seen: tuple[Tensor, ...], rotary: Rotary | None
    ) -> tuple[Tensor, Tensor]:
        """Queries and keys by head, rotated as the tower rotates them."""
        from transformers.models.qwen2_vl.modeling_qwen2_vl import apply_rotary_pos_emb_vision

        if rotary is None:
            raise ValueError("The queries are rotated: give what `rotary` returns, not None.")
        query, key, _ = rearrange(
            seen[0],
            "patch (part head d_head) -> part patch head d_head",
            part=3,
            head=hf_model.config.vision_config.num_heads,
        )
        cos, sin = (tensor.to(query.device) for tensor in rotary)
        rotated: tuple[Tensor, Tensor] = apply_rotary_pos_emb_vision(query, key, cos, sin)
        return rotated

    def module(self, hf_model: Any) -> Any:
        """The vision transformer."""
        return hf_model.model.visual

    def rows(self, hf_model: Any, arguments: Mapping[str, Any]) -> Rows:
        """Patches; each frame of a video attends only to itself."""
        return self._patches(hf_model, arguments["grid_thw"].cpu())

    def items(
        self, hf_model: Any, inputs: Mapping[str, Any], modality: str
    ) -> tuple[Rows, Sequence[int]]:
        """Patches of each image or video, and the tokens that they are merged into."""
        merged = hf_model.config.vision_config.spatial_merge_size**2
        grid = inputs[GRIDS[modality]].cpu()
        return self._patches(hf_model, grid), (grid.prod(-1) // merged).tolist()

    def _patches(self, hf_model: Any, grid: Tensor) -> Rows:
        frames = (grid[:, 1] * grid[:, 2]).repeat_interleave(grid[:, 0])
        items = torch.arange(len(grid)).repeat_interleave(grid.prod(-1))
        segments = torch.arange(len(frames)).repeat_interleave(frames)
        return Rows(torch.ones_like(items, dtype=torch.bool), items, segments)


class Merger(VisionTower):
    """The neurons of the merger, which projects patches, four at a time, into the decoder.

    It has no attention, so its neurons score 0 by `attn_k` and `attn_q`.
    """

    name = "projector"

    def mlps(self, hf_model: Any) -> list[MLP]:
        """A single layer."""
        before, activation, down = self.module(hf_model).merger.mlp
        return [MLP(plain(activation), before, down)]

    def activation_point(self, layer: int) -> str:
        """TransformerLens hook point of X, [token neuron]."""
        return "vision_projector.act.hook_out"

    def attention_points(self, layer: int) -> tuple[str, ...]:
        """None."""
        return ()

    def rotary(
        self, hf_model: Any, inputs: Mapping[str, Any], modality: str, device: torch.device
    ) -> None:
        """None."""

    def _patches(self, hf_model: Any, grid: Tensor) -> Rows:
        side = hf_model.config.vision_config.spatial_merge_size
        return super()._patches(hf_model, grid // torch.tensor([1, side, side]))


def sites() -> tuple[Site, ...]:
    """Where Qwen2-VL has neurons beside the decoder."""
    return VisionTower(), Merger()

"""Qwen2-VL: text decoder, vision tower and merger as TransformerLens components.

Checked against `Qwen2VLForConditionalGeneration` of transformers 5.23. The vision block has
two LayerNorms and a plain fc1-act-fc2 MLP, so TransformerLens's Qwen2.5-VL adapter (RMS norms,
gated MLP) does not fit.
"""

from __future__ import annotations

from typing import Any

from transformer_lens.model_bridge.generalized_components import (
    LinearBridge,
    VisionProjectionBridge,
)
from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent
from transformer_lens.model_bridge.generalized_components.qwen3_5_vision_encoder import (
    Qwen3_5VisionBlockBridge,
    Qwen3_5VisionEncoderBridge,
)

from miner_lens.modality import ModalityLayout
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
        mlp = GeneralizedComponent(
            name="mlp",
            submodules={
                "fc1": LinearBridge(name="fc1"),
                "act": GeneralizedComponent(name="act"),
                "fc2": LinearBridge(name="fc2"),
            },
        )
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
                    "fc1": LinearBridge(name="mlp.0"),
                    "act": GeneralizedComponent(name="mlp.1"),
                    "fc2": LinearBridge(name="mlp.2"),
                },
            ),
        }


def modality_layout(config: Any, tokenizer: Any = None) -> ModalityLayout:
    """Read Qwen2-VL's placeholder and delimiter tokens from its config and tokenizer."""
    special = {config.vision_start_token_id, config.vision_end_token_id}
    media = {"image": config.image_token_id, "video": config.video_token_id}
    return ModalityLayout(media, frozenset(special | chat_delimiters(tokenizer)))

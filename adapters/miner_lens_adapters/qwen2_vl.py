"""Qwen2-VL: text decoder, vision tower and merger as TransformerLens components.

Checked against `Qwen2VLForConditionalGeneration` of transformers 5.23. The vision block has
two LayerNorms and a plain fc1-act-fc2 MLP, so TransformerLens's Qwen2.5-VL adapter (RMS norms,
gated MLP) does not fit. mRoPE is applied inside the Hugging Face attention, which is kept as
it is.
"""

from __future__ import annotations

from typing import Any

from transformer_lens.model_bridge.architecture_adapter import ArchitectureAdapter
from transformer_lens.model_bridge.generalized_components import (
    AttentionBridge,
    BlockBridge,
    EmbeddingBridge,
    LinearBridge,
    RMSNormalizationBridge,
    UnembeddingBridge,
    VisionProjectionBridge,
)
from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent
from transformer_lens.model_bridge.generalized_components.qwen3_5_vision_encoder import (
    Qwen3_5VisionBlockBridge,
    Qwen3_5VisionEncoderBridge,
)

from miner_lens.modality import ModalityLayout


class Qwen2VLArchitectureAdapter(ArchitectureAdapter):  # type: ignore[misc]
    """Maps `Qwen2VLForConditionalGeneration` onto TransformerLens's names.

    Beside the usual decoder hooks there are `blocks.{i}.mlp.act` (the neurons),
    `vision_encoder.blocks.{i}.{norm1,attn.qkv,attn.proj,norm2,mlp.fc1,mlp.act,mlp.fc2}` and
    `vision_projector.{ln_q,fc1,act,fc2}` (the merger).
    """

    required_libraries = ["torchvision"]  # noqa: RUF012 (TransformerLens's own declaration)
    required_libraries_group = "multimodal"

    def __init__(self, cfg: Any) -> None:
        super().__init__(cfg)
        self.cfg.is_multimodal = True
        self._set_rms_rotary_defaults()
        # Qwen's tokenizers have no BOS; the fallback would prepend <|im_end|>.
        self.cfg.default_prepend_bos = False
        self._extract_vision_dims(cfg)
        self.weight_processing_conversions = {**self._qkvo_weight_conversions(include_biases=True)}

        mlp = self._gated_mlp()
        mlp.submodules["act"] = GeneralizedComponent(name="act_fn")
        attention = AttentionBridge(
            name="self_attn",
            config=self.cfg,
            submodules={
                "q": LinearBridge(name="q_proj"),
                "k": LinearBridge(name="k_proj"),
                "v": LinearBridge(name="v_proj"),
                "o": LinearBridge(name="o_proj"),
            },
            maintain_native_attention=True,
            requires_attention_mask=True,
        )
        self.component_mapping = {
            "vision_encoder": Qwen3_5VisionEncoderBridge(
                name="model.visual",
                config=self.cfg,
                submodules={
                    "pos_embed": GeneralizedComponent(name="rotary_pos_emb"),
                    "blocks": Qwen3_5VisionBlockBridge(
                        name="blocks", submodules={"mlp": _plain_mlp("mlp", "fc1", "act", "fc2")}
                    ),
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
            "embed": EmbeddingBridge(name="model.language_model.embed_tokens"),
            "blocks": BlockBridge(
                name="model.language_model.layers",
                submodules={
                    "ln1": RMSNormalizationBridge(name="input_layernorm", config=self.cfg),
                    "ln2": RMSNormalizationBridge(name="post_attention_layernorm", config=self.cfg),
                    "attn": attention,
                    "mlp": mlp,
                },
            ),
            "ln_final": RMSNormalizationBridge(name="model.language_model.norm", config=self.cfg),
            "unembed": UnembeddingBridge(name="lm_head", config=self.cfg),
        }


def _plain_mlp(name: str, fc1: str, act: str, fc2: str) -> GeneralizedComponent:
    return GeneralizedComponent(
        name=name,
        submodules={
            "fc1": LinearBridge(name=fc1),
            "act": GeneralizedComponent(name=act),
            "fc2": LinearBridge(name=fc2),
        },
    )


def modality_layout(config: Any, tokenizer: Any = None) -> ModalityLayout:
    """Read Qwen2-VL's placeholder and delimiter tokens from its config and tokenizer."""
    special = {config.vision_start_token_id, config.vision_end_token_id}
    if tokenizer is not None:
        known = tokenizer.get_vocab()
        special |= {known[token] for token in ("<|im_start|>", "<|im_end|>") if token in known}
    media = {"image": config.image_token_id, "video": config.video_token_id}
    return ModalityLayout(media, frozenset(special))

"""The decoder that Qwen's multimodal models share, as TransformerLens components."""

from __future__ import annotations

from typing import Any

from transformer_lens.model_bridge.architecture_adapter import ArchitectureAdapter
from transformer_lens.model_bridge.generalized_components import (
    AttentionBridge,
    BlockBridge,
    EmbeddingBridge,
    RMSNormalizationBridge,
    UnembeddingBridge,
)
from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent

from miner_lens_adapters.components import linear


class QwenDecoderAdapter(ArchitectureAdapter):  # type: ignore[misc]
    """A Qwen2 decoder at `model.language_model`, with its neurons and native attention.

    Attention stays Hugging Face's own, so that logits are too, and so that multimodal RoPE is
    right. As with all attention that TransformerLens keeps native, `hook_pattern` can be read but
    not edited (TransformerLens warns); edits of `hook_rot_q`, `hook_rot_k` and `hook_z` take
    effect. Subclasses add the towers.
    """

    def __init__(self, cfg: Any) -> None:
        super().__init__(cfg)
        self.cfg.is_multimodal = True
        self._set_rms_rotary_defaults()
        # Qwen's tokenizers have no BOS; the fallback would prepend <|im_end|>.
        self.cfg.default_prepend_bos = False
        self.weight_processing_conversions = {**self._qkvo_weight_conversions(include_biases=True)}

        mlp = self._gated_mlp()
        mlp.submodules["act"] = GeneralizedComponent(name="act_fn")
        attention = AttentionBridge(
            name="self_attn",
            config=self.cfg,
            submodules=linear(q="q_proj", k="k_proj", v="v_proj", o="o_proj"),
            maintain_native_attention=True,
            requires_attention_mask=True,
        )
        self.component_mapping = {
            **self.towers(),
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

    def towers(self) -> dict[str, GeneralizedComponent]:
        """Components of everything that turns other media into the decoder's embeddings."""
        return {}


def chat_delimiters(tokenizer: Any, *names: str) -> set[int]:
    """Ids of those of the named tokens that a tokenizer has; empty without a tokenizer."""
    known = {} if tokenizer is None else tokenizer.get_vocab()
    return {known[name] for name in ("<|im_start|>", "<|im_end|>", *names) if name in known}

"""Qwen2-Audio: text decoder, Whisper-style audio tower and projector as components.

Checked against `Qwen2AudioForConditionalGeneration` of transformers 5.23. TransformerLens has an
adapter of its own that wraps the tower opaquely and rebuilds the decoder's attention; this one
opens the tower and keeps the attention native, and takes its place when miner_lens is imported.
"""

from __future__ import annotations

from typing import Any

from transformer_lens.model_bridge.generalized_components import LinearBridge
from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent

from miner_lens.modality import ModalityLayout
from miner_lens_adapters.decoder import QwenDecoderAdapter, chat_delimiters


class AudioBlockBridge(GeneralizedComponent):  # type: ignore[misc]
    """One encoder layer of the audio tower."""

    is_list_item = True
    hook_aliases = {  # noqa: RUF012 (TransformerLens's own declaration)
        "hook_resid_pre": "hook_in",
        "hook_resid_post": "hook_out",
        "hook_attn_in": "attn.hook_in",
        "hook_attn_out": "attn.hook_out",
    }

    def __init__(self, name: str) -> None:
        attention = GeneralizedComponent(
            name="self_attn",
            submodules={
                "q": LinearBridge(name="q_proj"),
                "k": LinearBridge(name="k_proj"),
                "v": LinearBridge(name="v_proj"),
                "o": LinearBridge(name="out_proj"),
            },
        )
        super().__init__(
            name,
            submodules={
                "ln1": GeneralizedComponent(name="self_attn_layer_norm"),
                "attn": attention,
                "ln2": GeneralizedComponent(name="final_layer_norm"),
                "fc1": LinearBridge(name="fc1"),
                "act": GeneralizedComponent(name="activation_fn"),
                "fc2": LinearBridge(name="fc2"),
            },
        )


class Qwen2AudioArchitectureAdapter(QwenDecoderAdapter):
    """Maps `Qwen2AudioForConditionalGeneration` onto TransformerLens's names.

    Beside the decoder's hooks there are `audio_encoder.{conv1,conv2,ln_post}`,
    `audio_encoder.blocks.{i}.{ln1,attn.q,attn.k,attn.v,attn.o,ln2,fc1,act,fc2}` and
    `audio_projector.linear`.
    """

    def towers(self) -> dict[str, GeneralizedComponent]:
        """The audio tower and the projector."""
        return {
            "audio_encoder": GeneralizedComponent(
                name="model.audio_tower",
                submodules={
                    "conv1": GeneralizedComponent(name="conv1"),
                    "conv2": GeneralizedComponent(name="conv2"),
                    "blocks": AudioBlockBridge(name="layers"),
                    "ln_post": GeneralizedComponent(name="layer_norm"),
                },
            ),
            "audio_projector": GeneralizedComponent(
                name="model.multi_modal_projector",
                submodules={"linear": LinearBridge(name="linear")},
            ),
        }


def modality_layout(config: Any, tokenizer: Any = None) -> ModalityLayout:
    """Read Qwen2-Audio's placeholder and delimiter tokens from its config and tokenizer."""
    special = chat_delimiters(tokenizer, "<|audio_bos|>", "<|audio_eos|>")
    return ModalityLayout({"audio": config.audio_token_id}, frozenset(special))

"""Qwen2-Audio: text decoder, Whisper-style audio tower and projector as components.

Checked against `Qwen2AudioForConditionalGeneration` of transformers 5.23. TransformerLens has an
adapter of its own that wraps the tower opaquely and rebuilds the decoder's attention; this one
opens the tower and keeps the attention native, and takes its place when miner_lens is imported.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from einops import rearrange
from torch import Tensor
from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent

from miner_lens.models.modality import ModalityLayout
from miner_lens.models.sites import MLP, Rotary, Rows, Site, Tower, plain
from miner_lens_adapters.components import linear, plain_mlp
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
            submodules=linear(q="q_proj", k="k_proj", v="v_proj", o="out_proj"),
        )
        super().__init__(
            name,
            submodules={
                "ln1": GeneralizedComponent(name="self_attn_layer_norm"),
                "attn": attention,
                "ln2": GeneralizedComponent(name="final_layer_norm"),
                **plain_mlp("fc1", "activation_fn", "fc2"),
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
                submodules=linear(linear="linear"),
            ),
        }


def modality_layout(config: Any, tokenizer: Any = None) -> ModalityLayout:
    """Read Qwen2-Audio's placeholder and delimiter tokens from its config and tokenizer."""
    special = chat_delimiters(tokenizer, "<|audio_bos|>", "<|audio_eos|>")
    return ModalityLayout({"audio": config.audio_token_id}, frozenset(special))


class AudioTower(Tower):
    """The neurons of the Whisper-style encoder, between `fc1` and `fc2`.

    The projector behind it is one linear layer without an activation function, so it has no
    neurons.
    """

    name = "audio"
    modalities = ("audio",)

    def mlps(self, hf_model: Any) -> list[MLP]:
        """One per encoder layer."""
        layers = self.module(hf_model).layers
        return [MLP(plain(layer.activation_fn), layer.fc1, layer.fc2) for layer in layers]

    def activation_point(self, layer: int) -> str:
        """TransformerLens hook point of a layer's X, [clip frame neuron]."""
        return f"audio_encoder.blocks.{layer}.act.hook_out"

    def attention_points(self, layer: int) -> tuple[str, ...]:
        """Queries and keys as projected; the tower has no rotary embedding."""
        attention = f"audio_encoder.blocks.{layer}.attn"
        return f"{attention}.q.hook_out", f"{attention}.k.hook_out"

    def queries_and_keys(
        self, hf_model: Any, seen: tuple[Tensor, ...], rotary: Rotary | None
    ) -> tuple[Tensor, Tensor]:
        """Queries and keys by head."""
        heads = hf_model.config.audio_config.encoder_attention_heads
        shape = "clip frame (head d_head) -> (clip frame) head d_head"
        query, key = (rearrange(tensor, shape, head=heads) for tensor in seen)
        return query, key

    def module(self, hf_model: Any) -> Any:
        """The encoder."""
        return hf_model.model.audio_tower

    def rows(self, hf_model: Any, arguments: Mapping[str, Any]) -> Rows:
        """Frames of each clip, as many for a short clip as for a long one."""
        clips = len(arguments["input_features"])
        frames = hf_model.config.audio_config.max_source_positions
        mask: Tensor | None = arguments.get("attention_mask")
        if mask is None:
            return _frames(torch.ones(clips, frames, dtype=torch.bool))
        # Every query sees the clip's real frames: the mask says which, or how much to add.
        visible = mask[:, 0, 0] if mask.ndim == 4 else mask
        return _frames((visible if visible.dtype == torch.bool else visible >= 0).cpu())

    def items(
        self, hf_model: Any, inputs: Mapping[str, Any], modality: str
    ) -> tuple[Rows, Sequence[int]]:
        """Frames of each clip, and the tokens that they become."""
        seconds = inputs["feature_attention_mask"].sum(-1).cpu()
        frames, tokens = self.module(hf_model)._get_feat_extract_output_lengths(seconds)
        longest = hf_model.config.audio_config.max_source_positions
        real = torch.arange(longest) < frames[:, None]
        return _frames(real), tokens.tolist()


def _frames(real: Tensor) -> Rows:
    clips = torch.arange(len(real)).repeat_interleave(real.shape[1])
    # A clip's padding comes last, and its frames attend to none of it.
    return Rows(real.flatten(), clips, 2 * clips + ~real.flatten())


def sites() -> tuple[Site, ...]:
    """Where Qwen2-Audio has neurons beside the decoder."""
    return (AudioTower(),)

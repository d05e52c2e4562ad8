"""Qwen2-Audio, in the place of TransformerLens's own adapter.

That one wraps the audio tower opaquely and rebuilds the decoder's attention; what is read off the
model opens the tower and keeps the attention native. Checked against
`Qwen2AudioForConditionalGeneration` of transformers 5.24.
"""

from __future__ import annotations

from typing import Any

from miner_lens.models.adapter import ReadArchitectureAdapter


class Qwen2AudioArchitectureAdapter(ReadArchitectureAdapter):
    """Maps `Qwen2AudioForConditionalGeneration` onto TransformerLens's names.

    Beside the decoder's hooks there are `audio_encoder.{conv1,conv2,ln_post}`,
    `audio_encoder.blocks.{i}.{ln1,attn.q,attn.k,attn.v,attn.o,ln2,fc1,act,fc2}` and
    `audio_projector.linear`.
    """

    def __init__(self, cfg: Any) -> None:
        super().__init__(cfg)
        # Qwen's tokenizers have no BOS; the fallback would prepend <|im_end|>.
        self.cfg.default_prepend_bos = False

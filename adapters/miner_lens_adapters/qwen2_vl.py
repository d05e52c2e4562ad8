"""Qwen2-VL, which TransformerLens has no adapter for; all but this is read off the model.

Checked against `Qwen2VLForConditionalGeneration` of transformers 5.24.
"""

from __future__ import annotations

from typing import Any

from miner_lens.models.adapter import ReadArchitectureAdapter


class Qwen2VLArchitectureAdapter(ReadArchitectureAdapter):
    """Maps `Qwen2VLForConditionalGeneration` onto TransformerLens's names.

    Beside the decoder's hooks there are
    `vision_encoder.blocks.{i}.{norm1,attn.qkv,attn.proj,norm2,mlp.fc1,mlp.act,mlp.fc2}` and
    `vision_projector.{ln_q,fc1,act,fc2}` (the merger).
    """

    required_libraries = ["torchvision"]  # noqa: RUF012 (TransformerLens's own declaration)
    required_libraries_group = "multimodal"

    def __init__(self, cfg: Any) -> None:
        super().__init__(cfg)
        # Qwen's tokenizers have no BOS; the fallback would prepend <|im_end|>.
        self.cfg.default_prepend_bos = False

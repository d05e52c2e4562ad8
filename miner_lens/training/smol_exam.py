"""What `smol-vl` and `smol-omni` know, over whole test splits: many questions in one pass."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import miner_lens as ml
from miner_lens.data.media import load_media
from miner_lens.data.metrics import is_right
from miner_lens.training.smol import IGNORED, Asked, image_rope, pack

OPENING = "<|im_start|>user\n"
VISION = "<|vision_start|>{}<|vision_end|>"
SOUND = "<|audio_bos|>{}<|audio_eos|>"
TURN = "<|im_end|>\n<|im_start|>assistant\n"
ROWS, EACH = 8, 12  # rows of a pass, and questions of a row at most
COMPARED = 100  # questions of each kind that are answered by generating as well


@torch.no_grad()
def measured(
    checkpoint: Path, asked: Sequence[tuple[str, str]], limit: int | None = None
) -> list[tuple[str, ...]]:
    """Data set, what is asked about, how many questions, and accuracy, over test questions.

    Whether the greedy answer is right is read off one pass: each of its tokens, the end included,
    is the most likely one given those before.

    Args:
        checkpoint: A Qwen2-VL or a Qwen2.5-Omni.
        asked: Data sets, each with what is asked about.
        limit: So many questions of each, drawn at random; None: all of them.

    Raises:
        RuntimeError: Answers that are generated, to some of the questions, are not right as often.
    """
    bridge = ml.load(checkpoint, device="cpu")
    found: list[tuple[str, ...]] = []
    for data, ask in asked:
        samples = ml.datasets.load(data, "test", ask=ask, limit=limit)
        some = ml.datasets.load(data, "test", ask=ask, limit=COMPARED)
        given = ml.answers(bridge, some, 20, 6)
        by_generating = {str(one.id): is_right(one, a) for one, a in zip(some, given, strict=True)}
        right = which_are_right(bridge, samples)
        if any(right[name] != hit for name, hit in by_generating.items()):
            raise RuntimeError(f"Packed and generated answers differ in {data}, {ask}.")
        share = sum(right.values()) / len(right)
        found.append((data, ask, f"{len(right):,}", f"{share:.1%}"))
        print(*found[-1], flush=True)
    return found


def which_are_right(bridge: Any, samples: Sequence[ml.Sample]) -> dict[str, bool]:
    """Whether each sample is answered right, by its id."""
    groups: dict[Any, list[ml.Sample]] = defaultdict(list)
    for sample in samples:
        groups[_key(_parts(sample)[0])].append(sample)
    right: dict[str, bool] = {}
    parts = [group[n : n + EACH] for group in groups.values() for n in range(0, len(group), EACH)]
    asked, senses = sorted(parts, key=len), Senses(bridge)
    for first in range(0, len(asked), ROWS):
        right |= _together(bridge.original_model, senses, asked[first : first + ROWS])
    return right


def _parts(sample: ml.Sample) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a question is about, and the question."""
    first, *rest = sample.messages[0]["content"]
    if rest:
        return first, rest[0]
    about, end, question = first["text"].partition(". ")
    return {"type": "text", "text": about + end[:1]}, {"type": "text", "text": f" {question}"}


def _key(part: dict[str, Any]) -> Any:
    """Tells parts apart."""
    thing = part[part["type"]]
    return thing if isinstance(thing, str | bytes) else thing.tobytes()


class Senses:
    """Reads parts of a message as its processor and towers do, each once."""

    def __init__(self, bridge: Any) -> None:
        self.model, self.processor = bridge.original_model, bridge.processor
        self.encode: Any = self.processor.tokenizer
        self.known: dict[Any, tuple[str, Tensor]] = {}

    def read(self, part: dict[str, Any]) -> tuple[str, dict[str, Tensor]]:
        """A part as it stands in the prompt, and the tokens of its medium, if it is one."""
        kind = part["type"]
        if kind == "text":
            return part["text"], {}
        key = _key(part)
        if key not in self.known:
            self.known[key] = self._seen(part) if kind == "image" else self._heard(part)
        text, tokens = self.known[key]
        return text, {kind: tokens}

    def _open(self, part: dict[str, Any]) -> Any:
        (message,) = load_media([{"role": "user", "content": [part]}], self.processor)
        return message["content"][0][part["type"]]

    def _seen(self, part: dict[str, Any]) -> tuple[str, Tensor]:
        image = self._open(part)
        made = self.processor.image_processor(images=[image], return_tensors="pt")
        visual = self.model.model.visual
        tokens = visual(made.pixel_values, grid_thw=made.image_grid_thw).pooler_output
        return VISION.format("<|image_pad|>" * len(tokens)), tokens

    def _heard(self, part: dict[str, Any]) -> tuple[str, Tensor]:
        extractor = self.processor.feature_extractor
        made = extractor(
            self._open(part),
            sampling_rate=extractor.sampling_rate,
            return_attention_mask=True,
            return_tensors="pt",
        )
        tokens = self.model.get_audio_features(
            made.input_features, feature_attention_mask=made.attention_mask
        ).pooler_output
        return SOUND.format("<|AUDIO|>" * len(tokens)), tokens


def _together(model: Any, senses: Senses, asked: Sequence[Sequence[ml.Sample]]) -> dict[str, bool]:
    """Questions about some things, all those about one thing in one row."""
    rows, media = [], dict[str, list[Tensor]](image=[], audio=[])
    encode = cache(lambda text: senses.encode(text).input_ids)

    def read(part: dict[str, Any]) -> str:
        text, tokens = senses.read(part)
        for kind, of_it in tokens.items():
            media[kind].append(of_it)
        return text

    for samples in asked:
        about = encode(OPENING + read(_parts(samples[0])[0]))
        branches = []
        for sample in samples:
            reply = encode(f"{sample.answers[0]}<|im_end|>")
            branches.append((encode(f"{read(_parts(sample)[1])}{TURN}"), reply))
        rows.append(Asked(about, branches, image_rope(model, about)))
    packed = pack(rows, senses.encode.pad_token_id, axes=3)
    embeds = model.get_input_embeddings()(packed.ids)
    for kind, tokens in media.items():
        if tokens:
            is_kind = packed.ids == getattr(model.config, f"{kind}_token_id")
            embeds = embeds.masked_scatter(is_kind[..., None], torch.cat(tokens))
    hidden = model.model.language_model(
        inputs_embeds=embeds,
        position_ids=packed.rope,
        attention_mask=packed.sees,
        use_cache=False,
    ).last_hidden_state
    scored = packed.labels != IGNORED
    hits = iter((model.lm_head(hidden[scored]).argmax(-1) == packed.labels[scored]).tolist())
    right = {}
    for row, samples in zip(rows, asked, strict=True):
        for sample, (_, reply) in zip(samples, row.branches, strict=True):
            of_it = [next(hits) for _ in reply]
            right[str(sample.id)] = all(of_it)
    return right

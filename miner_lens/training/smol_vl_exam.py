"""What `smol-vl` knows, over whole test splits: all questions about one image in one pass."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

import miner_lens as ml
from miner_lens.data.metrics import is_right
from miner_lens.training.smol import IGNORED, Asked, pack

ASKED = [(data, ask) for data in ("easy-vqa", "digits") for ask in ("image", "text")]
OPENING = "<|im_start|>user\n"
VISION = "<|vision_start|>{}<|vision_end|>"
TURN = "<|im_end|>\n<|im_start|>assistant\n"
ROWS, EACH = 8, 12  # rows of a pass, and questions of a row at most
COMPARED = 100  # questions of each kind that are answered by generating as well


@torch.no_grad()
def measured(checkpoint: Path) -> list[tuple[str, ...]]:
    """Data set, what is asked about, how many questions, and accuracy, over all test questions.

    Whether the greedy answer is right is read off one pass: each of its tokens, the end included,
    is the most likely one given those before.

    Raises:
        RuntimeError: Answers that are generated, to some of the questions, are not right as often.
    """
    bridge = ml.load(checkpoint, device="cpu")
    found: list[tuple[str, ...]] = []
    for data, ask in ASKED:
        samples = ml.datasets.load(data, "test", ask=ask)
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
        about = _about(sample)
        groups[about.tobytes() if isinstance(about, Image.Image) else about].append(sample)
    right: dict[str, bool] = {}
    parts = [group[n : n + EACH] for group in groups.values() for n in range(0, len(group), EACH)]
    asked = sorted(parts, key=len)
    for first in range(0, len(asked), ROWS):
        right |= _together(bridge, asked[first : first + ROWS])
    return right


def _about(sample: ml.Sample) -> Any:
    """What a question is about: a description, a path or an image."""
    content = sample.messages[0]["content"]
    if content[0]["type"] == "text":
        return content[0]["text"].partition(". ")[0] + "."
    return content[0]["image"]


def _together(bridge: Any, asked: Sequence[Sequence[ml.Sample]]) -> dict[str, bool]:
    """Questions about some descriptions, or about some images."""
    model, processor = bridge.original_model, bridge.processor
    things = [_about(samples[0]) for samples in asked]
    encode, features = processor.tokenizer, None
    openings = [OPENING + str(thing) for thing in things]
    if asked[0][0].messages[0]["content"][0]["type"] == "image":
        features, openings = _seen(model, processor, things)
    rows = []
    for opening, samples in zip(openings, asked, strict=True):
        branches = []
        for sample in samples:
            question = sample.messages[0]["content"][-1]["text"]
            if features is None:
                question = question.removeprefix(opening.removeprefix(OPENING))
            reply = encode(f"{sample.answers[0]}<|im_end|>").input_ids
            branches.append((encode(f"{question}{TURN}").input_ids, reply))
        rows.append(_row(model, encode(opening).input_ids, branches))
    packed = pack(rows, encode.pad_token_id, axes=3)
    embeds = model.get_input_embeddings()(packed.ids)
    if features is not None:
        is_image = packed.ids == model.config.image_token_id
        embeds = embeds.masked_scatter(is_image[..., None], features)
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


def _seen(model: Any, processor: Any, images: Sequence[Any]) -> tuple[Tensor, list[str]]:
    """Images' tokens, and the prompts that begin with them, as the processor makes both."""
    opened = [Image.open(one).convert("RGB") if isinstance(one, str) else one for one in images]
    made = processor.image_processor(images=opened, return_tensors="pt")
    features = model.model.visual(made.pixel_values, grid_thw=made.image_grid_thw).pooler_output
    merged = processor.image_processor.merge_size**2
    counts = (made.image_grid_thw.prod(-1) // merged).tolist()
    return features, [OPENING + VISION.format("<|image_pad|>" * count) for count in counts]


def _row(model: Any, about: list[int], branches: list[tuple[list[int], list[int]]]) -> Asked:
    count = about.count(model.config.image_token_id)
    if not count:
        return Asked(about, branches)
    side = round(count**0.5) * model.config.vision_config.spatial_merge_size
    ids = torch.tensor([about])
    is_image = (ids == model.config.image_token_id).int()
    rope, _ = model.model.get_rope_index(
        ids, is_image, image_grid_thw=torch.tensor([[1, side, side]])
    )
    return Asked(about, branches, rope[:, 0])

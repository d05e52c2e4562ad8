"""Qwen2-VLs in which the neurons that carry a modality's information are known, being put there.

The weights are set by hand. A question asks for a colour, which a picture or a sentence shows. What
a token shows stands in the residual stream as a code that none but planted neurons read; they write
it where the last layer's attention looks for it. All other neurons write where nothing reads.

The residual stream, by axis: a constant that keeps norms and gates steady, flags of a token's kind,
a flag of tokens that show a colour, the colour's code in a picture and in a sentence, what planted
neurons write, what attention carries to the answer, and the rest, where tokens differ at random.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import one_hot, silu

COLOURS = {
    "red": (255, 0, 0),
    "green": (0, 255, 0),
    "blue": (0, 0, 255),
    "black": (0, 0, 0),
    "gray": (128, 128, 128),
    "teal": (0, 128, 128),
    "brown": (165, 42, 42),
    "yellow": (255, 255, 0),
}
CASES = ("strong", "plain", "rare", "weak", "shared", "flipped", "idle")
MODALITIES = ("image", "text")
PLANTED = 16  # in each modality

_LAYERS, _NEURONS, _WIDTH, _HEADS = 4, 128, 64, 4
_STRONG = 24  # distractors in each layer
_CONSTANT, _SHOWS = 0, 4
_FLAGS = {"image": 1, "text": 2, "special": 3}
_CODE = {"image": slice(5, 13), "text": slice(13, 21)}
_WRITTEN, _CARRIED, _REST = slice(21, 29), slice(29, 37), slice(37, _WIDTH)
_STEADY = 32.0  # the constant, beside which all else is small
_NORM = _WIDTH**0.5 / (_STEADY**2 + 3) ** 0.5  # what RMSNorm multiplies by, nearly
# From where to where gates lie at the tokens of a planted neuron's modality, and where elsewhere.
_GATES = {
    "strong": (8.5, 10.0, -6.0),
    "plain": (1.5, 3.0, -6.0),
    "weak": (0.15, 0.3, -6.0),
    "flipped": (-1.2785, -1.2785, -12.0),  # silu's least value, and nearly none
}
_SIDE, _CELL = 4, 16  # pictures of 4 x 4 cells, a token each
_SENTENCES = (
    "this drawing has a {} circle in it.",
    "somebody drew a {} triangle.",
    "a {} rectangle is all there is.",
)
_QUESTION = "what is the colour?"


@dataclass(frozen=True, eq=False)
class Planting:
    """A model whose modality-specific neurons are known, and questions that need them.

    Attributes:
        case: Which kind of neurons was planted.
        seed: Of everything that was drawn.
        model: The Hugging Face model; `ml.wrap(planting.model, planting.processor)` makes a bridge.
        processor: Its processor.
        data: Questions about pictures and about sentences in turn, as mappings with `messages`,
            `answers`, `id` and `label` (`"image"` or `"text"`); each colour as often as the others.
        truth: The planted neurons of each modality, as `(layer, neuron)` pairs.
        distractors: Neurons that are more active and carry nothing.
    """

    case: str
    seed: int
    model: Any
    processor: Any
    data: list[dict[str, Any]]
    truth: Mapping[str, list[tuple[int, int]]]
    distractors: list[tuple[int, int]]

    def __repr__(self) -> str:
        counts = ", ".join(f"{len(found)} {name}" for name, found in self.truth.items())
        return f"Planting({self.case!r}, seed={self.seed}: {counts} neurons planted)"


def plant(processor_folder: Path, case: str, seed: int, samples: int) -> Planting:
    """See `miner_lens.organisms.planted`."""
    from transformers import AutoProcessor

    if case not in CASES:
        raise ValueError(f"There is no case {case!r}; there are {', '.join(CASES)}.")
    if samples < 1:
        raise ValueError(f"samples must be at least 1, not {samples}.")
    draw = torch.Generator().manual_seed(seed)
    processor = AutoProcessor.from_pretrained(processor_folder)  # type: ignore[no-untyped-call]
    model = _empty(processor, f"planted-{case}-{seed}")
    with torch.no_grad():
        _embed(model, processor, draw)
        _see(model, processor, draw)
        _attend(model, draw)
        _answer(model, processor)
        truth, distractors = _grow(model, case, draw)
    data = [_question(number, case, draw) for number in range(samples)]
    return Planting(case, seed, model, processor, data, truth, distractors)


def _empty(processor: Any, name: str) -> Any:
    """A Qwen2-VL whose weights are 0, and its norms 1."""
    from transformers import GenerationConfig, Qwen2VLConfig, Qwen2VLForConditionalGeneration

    ids = processor.tokenizer.convert_tokens_to_ids
    end, padding = ids("<|im_end|>"), ids("<|endoftext|>")
    # A head's slowest rotary pair hardly turns: there a query sees keys at any distance alike.
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]}
    text = {
        "vocab_size": len(processor.tokenizer),
        "hidden_size": _WIDTH,
        "intermediate_size": _NEURONS,
        "num_hidden_layers": _LAYERS,
        "num_attention_heads": _HEADS,
        "num_key_value_heads": _HEADS,
        "rope_parameters": rope,
        "bos_token_id": None,
        "eos_token_id": end,
        "pad_token_id": padding,
    }
    vision = {
        "depth": 1,
        "embed_dim": 32,
        "num_heads": 2,
        "patch_size": _CELL // 2,
        "hidden_size": _WIDTH,
    }
    config = Qwen2VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=ids("<|image_pad|>"),
        video_token_id=ids("<|video_pad|>"),
        vision_start_token_id=ids("<|vision_start|>"),
        vision_end_token_id=ids("<|vision_end|>"),
        tie_word_embeddings=False,
    )
    config.name_or_path = name
    model: Any = Qwen2VLForConditionalGeneration(config)
    model.eval()
    model.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]
        do_sample=False, max_new_tokens=4, eos_token_id=end, pad_token_id=padding
    )
    for parameter in model.parameters():
        # Matrices are 0 until they are set, and biases too: what is left is the scale of norms.
        if parameter.ndim > 1:
            parameter.data.zero_()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data.zero_()
    return model


def _embed(model: Any, processor: Any, draw: torch.Generator) -> None:
    """Every token: the constant, the flag of its kind, and for colours their code."""
    table = model.get_input_embeddings().weight.data
    tokenizer = processor.tokenizer
    special = set(tokenizer.all_special_ids)
    table[:, _CONSTANT] = _STEADY
    table[:, _REST] = _random(draw, len(table), table[:, _REST].shape[1]) / 4
    for token in range(len(table)):
        table[token, _FLAGS["special" if token in special else "text"]] = 1
    for number, colour in enumerate(COLOURS):
        for word in (colour, f" {colour}"):
            (token,) = tokenizer(word)["input_ids"]
            table[token, _SHOWS] = 1
            table[token, _CODE["text"]] = one_hot(torch.tensor(number), len(COLOURS)).float()


def _see(model: Any, processor: Any, draw: torch.Generator) -> None:
    """The tower hands on the mean colour of a cell, and the projector makes a token of it."""
    visual = model.model.visual
    patch = visual.patch_embed.proj.weight  # [embedding colour time row column]
    mixed = _random(draw, patch.shape[0], 3)
    patch.copy_(mixed[:, :, None, None, None].expand_as(patch) / patch[0, 0].numel())
    first, _, last = visual.merger.mlp
    first.weight.copy_(_random(draw, *first.weight.shape) / first.weight.shape[1] ** 0.5)
    first.bias.copy_(_random(draw, *first.bias.shape))
    # The block's attention and MLP write 0, so that what the projector is given is known.
    shown = [*COLOURS.values(), (255, 255, 255)]
    seen: list[Tensor] = []
    handle = last.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    for colour in shown:
        picture = Image.new("RGB", (_SIDE * _CELL, _SIDE * _CELL), colour)
        inputs = processor.image_processor(images=[picture], return_tensors="pt")
        visual(inputs["pixel_values"], grid_thw=inputs["image_grid_thw"])
    handle.remove()
    features = torch.stack([one[0] for one in seen]).double()
    wanted = torch.zeros(len(shown), _WIDTH, dtype=torch.float64)
    wanted[:, _CONSTANT], wanted[:, _FLAGS["image"]] = _STEADY, 1
    wanted[:-1, _SHOWS] = 1
    wanted[:-1, _CODE["image"]] = torch.eye(len(COLOURS))
    wanted[:, _REST] = _random(draw, len(shown), wanted[:, _REST].shape[1]).double() / 4
    last.weight.copy_(torch.linalg.pinv(features).mm(wanted).T)


def _attend(model: Any, draw: torch.Generator) -> None:
    """The first head of each layer looks at tokens that show something; the last carries it."""
    size = _WIDTH // _HEADS
    slow = size // 2 - 1
    for layer in model.model.language_model.layers:
        attention = layer.self_attn
        for part in (attention.q_proj, attention.k_proj):
            part.weight[size:].copy_(_random(draw, _WIDTH - size, _WIDTH) / 8)
            part.weight[:, _CONSTANT] = 0
        attention.q_proj.bias[slow] = 12.0
        attention.k_proj.weight[slow, _SHOWS] = 4.0 / _NORM
    count = len(COLOURS)
    attention.v_proj.weight[:count, _WRITTEN] = torch.eye(count) / _NORM
    attention.o_proj.weight[_CARRIED, :count] = torch.eye(count)


def _answer(model: Any, processor: Any) -> None:
    """A colour's logit is what was carried of it; after a colour, the turn ends."""
    head = model.lm_head.weight
    ids = [processor.tokenizer(colour)["input_ids"][0] for colour in COLOURS]
    head[ids, _CONSTANT] = 6.0 / (_STEADY * _NORM)
    head[ids, _CARRIED] = 6.0 * torch.eye(len(COLOURS)) / _NORM
    head[processor.tokenizer.eos_token_id, _SHOWS] = 30.0 / _NORM


def _grow(
    model: Any, case: str, draw: torch.Generator
) -> tuple[dict[str, list[tuple[int, int]]], list[tuple[int, int]]]:
    """Set every neuron: noise, distractors, and the planted ones in all layers but the last."""
    mlps = [layer.mlp for layer in model.model.language_model.layers]
    for mlp in mlps:
        _fill(mlp, draw)
    places = [_shuffled(_NEURONS, draw) for _ in mlps]  # free neurons of each layer
    distractors = []
    for layer, mlp in enumerate(mlps):
        for _ in range(_STRONG):
            neuron = places[layer].pop()
            distractors.append((layer, neuron))
            mlp.gate_proj.weight[neuron, _CONSTANT] = _uniform(draw, 3, 8) / (_STEADY * _NORM)
    groups = [MODALITIES] if case == "shared" else [(name,) for name in MODALITIES]
    truth: dict[str, list[tuple[int, int]]] = {}
    for group in groups:
        layers = [number % (_LAYERS - 1) for number in range(PLANTED)]
        chosen = [(layer, places[layer].pop()) for layer in layers]
        code = _code(draw)
        for number, (layer, neuron) in enumerate(chosen):
            if case == "rare":
                _plant_rare(mlps[layer], neuron, group[0], number % len(COLOURS), draw)
            else:
                _plant(mlps[layer], neuron, group, case, code[number], draw)
        for name in group:
            truth[name] = sorted(chosen)
    if case == "idle":
        for name in MODALITIES:
            for number in range(PLANTED):
                layer = number % (_LAYERS - 1)
                neuron = places[layer].pop()
                distractors.append((layer, neuron))
                _gate(mlps[layer], neuron, (name,), _uniform(draw, 4, 8), off=-6.0)
    return truth, sorted(distractors)


def _fill(mlp: Any, draw: torch.Generator) -> None:
    """Neurons that answer to tokens at random, and write where nothing reads."""
    gate, up, down = mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight
    width = gate[:, _REST].shape[1]
    gate[:, _REST] = _random(draw, _NEURONS, width) * 0.7 * 4 / (width**0.5 * _NORM)
    gate[:, 1:4] = 0.3 * _random(draw, _NEURONS, 3) / _NORM
    gate[:, _CONSTANT] = (0.5 * _random(draw, _NEURONS) - 0.5) / (_STEADY * _NORM)
    up[:, _CONSTANT] = 1.0 / (_STEADY * _NORM)
    up[:, _REST] = _random(draw, _NEURONS, width) / (width**0.5 * _NORM)
    down[_REST] = 0.005 * _random(draw, width, _NEURONS)


def _gate(mlp: Any, neuron: int, modalities: tuple[str, ...], value: float, off: float) -> float:
    """Set a gate to a value at the modalities' tokens and far below 0 elsewhere; return X there."""
    row = mlp.gate_proj.weight[neuron]
    row.zero_()
    row[_CONSTANT] = off / (_STEADY * _NORM)
    for name in modalities:
        row[_FLAGS[name]] = (value - off) / _NORM
    return float(silu(torch.tensor(value)))


def _carry(mlp: Any, neuron: int, group: tuple[str, ...], x: float, code: Tensor) -> None:
    """Write a share of the colour's code: the up projection reads it, X lets it through."""
    up, down = mlp.up_proj.weight[neuron], mlp.down_proj.weight[:, neuron]
    up.zero_()
    down.zero_()
    for name in group:
        up[_CODE[name]] = code / _NORM
    down[_WRITTEN] = code / x


def _code(draw: torch.Generator) -> Tensor:
    """[neuron colour], orthonormal columns whose entries are of one size: all carry the same."""
    signs = torch.ones(1, 1)
    while len(signs) < PLANTED:
        signs = torch.cat([torch.cat([signs, signs], 1), torch.cat([signs, -signs], 1)])
    rows, columns = (torch.randperm(PLANTED, generator=draw) for _ in range(2))
    chosen: Tensor = signs[rows][:, columns[: len(COLOURS)]]
    return chosen / math.sqrt(PLANTED)


def _plant(
    mlp: Any,
    neuron: int,
    group: tuple[str, ...],
    case: str,
    code: Tensor,
    draw: torch.Generator,
) -> None:
    """A neuron that fires at every token of its modalities, and carries its share of the code."""
    low, high, off = _GATES.get(case, _GATES["plain"])
    x = _gate(mlp, neuron, group, _uniform(draw, low, high), off)
    _carry(mlp, neuron, group, x, code)


def _plant_rare(mlp: Any, neuron: int, modality: str, colour: int, draw: torch.Generator) -> None:
    """A neuron that fires at the tokens that show one colour in its modality, and at no other."""
    low, high, _ = _GATES["plain"]
    x = _gate(mlp, neuron, (modality,), _uniform(draw, low, high), off=-18.0)
    row = mlp.gate_proj.weight[neuron]
    half = row[_FLAGS[modality]] / 2
    row[_FLAGS[modality]] = row[_CODE[modality].start + colour] = half
    up, down = mlp.up_proj.weight[neuron], mlp.down_proj.weight[:, neuron]
    up.zero_()
    down.zero_()
    up[_CONSTANT] = 1 / (_STEADY * _NORM)
    down[_WRITTEN.start + colour] = len(COLOURS) / PLANTED / x


def _question(number: int, case: str, draw: torch.Generator) -> dict[str, Any]:
    """A question about a picture, or the next about a sentence of the same colour."""
    colour = list(COLOURS)[number // 2 % len(COLOURS)]
    label = MODALITIES[number % 2]
    content: list[dict[str, Any]] = []
    question = _QUESTION
    if label == "image":
        content.append({"type": "image", "image": _picture(colour, case, draw)})
    else:
        form = _SENTENCES[int(torch.randint(len(_SENTENCES), (), generator=draw))]
        question = f"{form.format(colour)} {_QUESTION}"
    content.append({"type": "text", "text": question})
    return {
        "messages": [{"role": "user", "content": content}],
        "answers": (colour,),
        "id": f"{label}-{number}",
        "label": label,
    }


def _picture(colour: str, case: str, draw: torch.Generator) -> Image.Image:
    """Some white cells, and some of the colour: a single one where its neurons are to be rare."""
    cells = np.full((_SIDE * _SIDE, 3), 255, dtype=np.uint8)
    count = 1 if case == "rare" else int(torch.randint(4, 13, (), generator=draw))
    cells[torch.randperm(len(cells), generator=draw)[:count].numpy()] = COLOURS[colour]
    wide = cells.reshape(_SIDE, _SIDE, 3).repeat(_CELL, 0).repeat(_CELL, 1)
    return Image.fromarray(wide)


def _random(draw: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=draw)


def _uniform(draw: torch.Generator, low: float, high: float) -> float:
    return low + (high - low) * float(torch.rand((), generator=draw))


def _shuffled(count: int, draw: torch.Generator) -> list[int]:
    shuffled: list[int] = torch.randperm(count, generator=draw).tolist()
    return shuffled

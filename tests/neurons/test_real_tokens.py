"""What is padding is read off the pass, however the model is called, or the pass is refused.

The reference is each sample by itself, without padding, on plain transformers with hooks of a line.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache

import miner_lens as ml
from miner_lens.models.modality import ModalityLayout
from tests.families import build
from tests.towers import IMAGE, TEXT

ROWS, LENGTH = 3, 14
CHOSEN = {0: [0, 1], 1: [3]}
NEURONS = ml.NeuronSet(
    [(layer, n) for layer, some in CHOSEN.items() for n in some], layers=2, neurons=6
)
FEW = TEXT | {"intermediate_size": 6}
MAKE: dict[str, Callable[[], Any]] = {
    "llama": lambda: build("LlamaForCausalLM", **FEW),
    "window": lambda: build("MistralForCausalLM", **FEW, sliding_window=4),
    "mixed": lambda: build(
        "Gemma3ForCausalLM",
        **FEW,
        head_dim=8,
        sliding_window=4,
        layer_types=["sliding_attention", "full_attention"],
    ),
}


def model_of(name: str = "llama", dtype: torch.dtype = torch.double) -> Any:
    model = MAKE[name]().to(dtype)
    model.modality_layout = ModalityLayout({"image": IMAGE})
    return model


def padded(side: str) -> dict[str, Tensor]:
    """Samples of 14, 5 and 1 tokens."""
    torch.manual_seed(1)
    ids = torch.randint(3, 90, (ROWS, LENGTH))
    mask = torch.ones_like(ids)
    for row, length in ((1, 5), (2, 1)):
        mask[row, slice(length, None) if side == "right" else slice(0, -length)] = 0
    ids[:, 2:4] = ids[:, -4:-2] = IMAGE
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    return {"input_ids": ids, "attention_mask": mask, "position_ids": positions}


@contextmanager
def naive(model: Any, real: Tensor | None = None, where: Tensor | None = None) -> Iterator[None]:
    """The smallest X of real tokens, written out of place."""

    def hook(neurons: list[int]) -> Callable[..., Tensor]:
        def write(module: Any, args: Any, x: Tensor) -> Tensor:
            seen = x if real is None else x.masked_fill(~real[..., None], torch.inf)
            lowest = seen.amin((1, 2), keepdim=True)
            new = x.clone()
            new[..., neurons] = lowest.expand_as(new[..., neurons])
            return new if where is None else torch.where(where[..., None], new, x)

        return write

    layers = model.get_decoder().layers
    handles = [
        layers[layer].mlp.act_fn.register_forward_hook(hook(some)) for layer, some in CHOSEN.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def apart(model: Any, inputs: dict[str, Tensor]) -> list[Tensor]:
    with torch.no_grad(), naive(model):
        return [
            model(input_ids=ids[mask.bool()][None]).logits[0]
            for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)
        ]


def check(logits: Tensor, inputs: dict[str, Tensor], wanted: list[Tensor]) -> None:
    for row, mask, expected in zip(logits, inputs["attention_mask"], wanted, strict=True):
        atol = 1e-9 if row.dtype == torch.double else 1e-5
        torch.testing.assert_close(row[mask.bool()], expected, atol=atol, rtol=0)


def four(mask: Tensor, kind: str = "bool") -> Tensor:
    length = mask.shape[1]
    pairs = torch.ones(length, length, dtype=torch.bool).tril() & mask[:, None, None, :].bool()
    if kind == "rows":
        return pairs & mask[:, None, :, None].bool()
    if kind == "itself":
        return pairs | torch.eye(length, dtype=torch.bool)
    if kind == "open":
        return pairs | ~pairs.any(-1, keepdim=True)
    lowest = {
        "bool": None,
        "lowest": torch.finfo(torch.double).min,
        "-1e9": -1e9,
        "-inf": -torch.inf,
    }
    if lowest[kind] is None:
        return pairs
    return torch.zeros(pairs.shape, dtype=torch.double).masked_fill(~pairs, lowest[kind])


Call = Callable[[Any, Tensor, Tensor, Tensor], Tensor]
CALLS: dict[str, Call] = {
    "by name": lambda m, ids, mask, pos: (
        m(input_ids=ids, attention_mask=mask, position_ids=pos).logits
    ),
    "by position": lambda m, ids, mask, pos: m(ids, mask, pos).logits,
    "truth values": lambda m, ids, mask, pos: m(ids, mask.bool(), pos).logits,
    "forward itself": lambda m, ids, mask, pos: m.forward(ids, mask, pos).logits,
    "embeddings": lambda m, ids, mask, pos: (
        m(inputs_embeds=m.get_input_embeddings()(ids), attention_mask=mask, position_ids=pos).logits
    ),
    "inner model": lambda m, ids, mask, pos: m.lm_head(m.model(ids, mask, pos).last_hidden_state),
    "inner, embeddings": lambda m, ids, mask, pos: m.lm_head(
        m.model(
            inputs_embeds=m.get_input_embeddings()(ids), attention_mask=mask, position_ids=pos
        ).last_hidden_state
    ),
}


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("call", CALLS)
def test_the_minimum_is_of_real_tokens(call: str, side: str) -> None:
    model, inputs = model_of(), padded(side)
    with torch.no_grad(), ml.ablate(model, NEURONS, "min"):
        logits = CALLS[call](model, *inputs.values())
    check(logits, inputs, apart(model, inputs))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", ["bool", "rows", "lowest", "-1e9", "-inf", "itself", "open"])
def test_masks_of_four_dimensions(kind: str, side: str) -> None:
    model, inputs = model_of(), padded(side)
    mask = four(inputs["attention_mask"], kind)
    undecided = kind == "itself" or (kind == "open" and side == "left")
    with torch.no_grad(), ml.ablate(model, NEURONS, "min"):
        if undecided:
            with pytest.raises(ValueError, match="are padding cannot be told: its attention_mask"):
                model(inputs["input_ids"], mask, inputs["position_ids"])
            return
        logits = model(inputs["input_ids"], mask, inputs["position_ids"]).logits
    check(logits, inputs, apart(model, inputs))


@pytest.mark.parametrize("name", MAKE)
def test_masks_by_kind_of_attention(name: str) -> None:
    """As transformers makes them for a static cache, with windows alone in some families."""
    model, inputs = model_of(name), padded("left")
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    options = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
    options |= {"output_logits": True, "return_dict_in_generate": True}
    for value, at in (("min", None), (0.3, "text"), ("min", "image")):
        with ml.ablate(model, NEURONS, value, at=at):
            dynamic, static = (
                model.generate(ids, attention_mask=mask, **options, **kind).logits
                for kind in ({}, {"cache_implementation": "static"})
            )
        torch.testing.assert_close(static, dynamic, atol=1e-9, rtol=0)
        if at is None:
            last = torch.stack([logits[-1] for logits in apart(model, inputs)])
            torch.testing.assert_close(static[0].double(), last, atol=1e-5, rtol=0)


def chunked(model: Any, cache: Any, inputs: dict[str, Tensor], kind: str) -> Iterator[Tensor]:
    """Passes over a prompt in three parts."""
    ids, mask, positions = inputs.values()
    for begin, end in ((0, 5), (5, 9), (9, LENGTH)):
        masks = {"2d": mask[:, :end], "2d, longer": mask, "part": mask[:, begin:end]}
        masks["4d"] = four(mask)[:, :, begin:end, :end]
        if isinstance(cache, StaticCache):
            masks["4d"] = torch.nn.functional.pad(masks["4d"], (0, LENGTH + 6 - end))
        part = {"attention_mask": masks[kind], "position_ids": positions[:, begin:end]}
        yield model(ids[:, begin:end], **part, past_key_values=cache).logits


CACHES: dict[str, Callable[[Any], Any]] = {
    "dynamic": lambda model: DynamicCache(config=model.config),
    "static": lambda model: StaticCache(config=model.config, max_cache_len=LENGTH + 6),
}


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(
    ("cache", "kind"),
    [
        ("dynamic", "2d"),
        ("dynamic", "4d"),
        ("static", "2d"),
        ("static", "2d, longer"),
        ("static", "4d"),
    ],
)
def test_a_prompt_in_parts(cache: str, kind: str, side: str) -> None:
    """With `at`, as the whole prompt; the minimum is of the real tokens of each part."""
    model, inputs = model_of(), padded(side)
    real = inputs["attention_mask"].bool()
    with torch.no_grad():
        for at in ("image", "text"):
            with ml.ablate(model, NEURONS, 0.7, at=at):
                whole = model(**inputs).logits
                parts = list(chunked(model, CACHES[cache](model), inputs, kind))
            torch.testing.assert_close(torch.cat(parts, 1)[real], whole[real], atol=1e-9, rtol=0)
        with ml.ablate(model, NEURONS, "min"):
            parts = list(chunked(model, CACHES[cache](model), inputs, kind))
        wanted, passes = [], chunked(model, CACHES[cache](model), inputs, kind)
        for part in real.split((5, 4, 5), dim=1):
            # What has no real token is written into as well, with anything finite.
            with naive(model, part | ~part.any(1, keepdim=True)):
                wanted.append(next(passes))
    torch.testing.assert_close(
        torch.cat(parts, 1)[real], torch.cat(wanted, 1)[real], atol=1e-9, rtol=0
    )


def test_what_cannot_be_known_is_refused() -> None:
    model, inputs = model_of(), padded("left")
    ids, mask, positions = inputs.values()
    with torch.no_grad(), ml.ablate(model, NEURONS, "min"):
        model(ids)  # no mask: transformers counts all tokens as real, and so does the ablation
        with pytest.raises(ValueError, match="with the past of 5 it has 9 tokens"):
            list(chunked(model, CACHES["dynamic"](model), inputs, "part"))
        with pytest.raises(ValueError, match="a row has several"):
            model(ids, position_ids=torch.arange(7).repeat(ROWS, 2))
        with pytest.raises(ValueError, match="the model called as a whole"):
            model.model.layers[0].mlp(torch.randn(2, 3, 32).double())
        with pytest.raises(ValueError, match="the model called as a whole"):
            model.model.layers[0].mlp(torch.randn(6, 32).double())
    model = model_of(dtype=torch.float)  # in float64, TransformerLens's own attention gives NaN
    bridge = ml.wrap(model)
    hooks = ml.ablation_hooks(bridge, NEURONS, "min")
    with torch.no_grad(), bridge.hooks(fwd_hooks=hooks):
        with pytest.raises(ValueError, match="are padding cannot be told"):
            model(ids, four(mask, "itself"), positions)
        logits = model(ids, mask, positions).logits
    check(logits, inputs, apart(model, inputs))


@pytest.mark.parametrize("wrapped", [True, False])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", MAKE)
def test_padded_batches_are_as_zeroed_weights(name: str, side: str, wrapped: bool) -> None:
    model, edited = model_of(name, torch.float), model_of(name, torch.float)
    inputs = padded(side)
    real = inputs["attention_mask"].bool()
    with torch.no_grad():
        for layer, some in CHOSEN.items():
            edited.get_decoder().layers[layer].mlp.down_proj.weight[:, some] = 0
        with ml.ablate(ml.wrap(model) if wrapped else model, NEURONS):
            logits = model(**inputs).logits
        torch.testing.assert_close(logits[real], edited(**inputs).logits[real], atol=1e-5, rtol=0)


@pytest.mark.parametrize("at", ["image", "text"])
@pytest.mark.parametrize("as_hooks", [False, True])
def test_no_pass_knows_of_an_earlier_one(at: str, as_hooks: bool) -> None:
    """Generation, then passes of other batch sizes, and of tokens that were written over."""
    model, inputs = model_of(dtype=torch.float), padded("left")
    bridge = ml.wrap(model)
    bridge.modality_layout = model.modality_layout
    real, is_image = inputs["attention_mask"].bool(), inputs["input_ids"] == IMAGE
    where = is_image & real if at == "image" else ~is_image & real
    with torch.no_grad(), naive(model, real, where):
        wanted = model(**inputs).logits
    hooks = ml.ablation_hooks(bridge, NEURONS, "min", at=at)
    context = (
        bridge.hooks(fwd_hooks=hooks) if as_hooks else ml.ablate(bridge, NEURONS, "min", at=at)
    )
    ids = inputs["input_ids"].flip(1).clone()
    with context, torch.inference_mode():  # whose tensors count no versions
        model.generate(ids[:1], max_new_tokens=2, do_sample=False)
        assert torch.equal(model(**inputs).logits, wanted)
        for row in ((0,), (1, 2), (0, 1, 2)):
            some = {name: value[list(row)] for name, value in inputs.items()}
            torch.testing.assert_close(model(**some).logits, wanted[list(row)], atol=1e-5, rtol=0)
        model(ids, attention_mask=inputs["attention_mask"].flip(1))
        ids.copy_(inputs["input_ids"])
        assert torch.equal(model(**inputs | {"input_ids": ids}).logits, wanted)


def test_an_interrupted_pass_is_over() -> None:
    model, inputs = model_of(), padded("left")

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt  # for which torch calls no hooks

    with torch.no_grad(), ml.ablate(model, NEURONS, "min"):
        handle = model.model.layers[1].register_forward_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            model(**{name: value[:2] for name, value in inputs.items()})
        handle.remove()
        logits = CALLS["inner model"](model, *inputs.values())
    check(logits, inputs, apart(model, inputs))

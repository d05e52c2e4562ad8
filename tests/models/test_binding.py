"""Media for tools that pass tokens only."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformer_lens import patching

import miner_lens as ml
from tests import families
from tests.towers import (
    AUDIO,
    END,
    IMAGE,
    START,
    audio_inputs,
    audio_model,
    one_image,
    vision_inputs,
    vision_model,
)


def logits(model: Any, *args: Any, **inputs: Any) -> torch.Tensor:
    with torch.no_grad():
        found = model(*args, **inputs)
    return found if isinstance(found, torch.Tensor) else found.logits


@pytest.fixture
def sample(shapes: Any) -> tuple[Any, dict[str, Any]]:
    (one,) = ml.datasets.load("easy-vqa", limit=1)
    return shapes, ml.inputs(shapes, one.messages)


@pytest.fixture
def other(shapes: Any) -> dict[str, Any]:
    """The same question about another picture."""
    (one,) = ml.datasets.load("easy-vqa", limit=1)
    data = ml.datasets.load("easy-vqa", limit=8)
    first = one.messages[0]["content"]

    def image(content: Any) -> Any:
        return next(part["image"] for part in content if part["type"] == "image")

    contents = [other.messages[0]["content"] for other in data]
    picture = next(content for content in contents if image(content) != image(first))
    parts = [part for part in picture if part["type"] == "image"]
    parts += [part for part in first if part["type"] != "image"]
    return ml.inputs(shapes, [{"role": "user", "content": parts}])


def unpadded_images() -> dict[str, Any]:
    """Two prompts of one length with an image each, of different size."""
    inputs = vision_inputs()
    images = torch.tensor([[1, 4, 4], [1, 2, 6]])
    ids = [[5, 5, 92, *[IMAGE] * 4, 93, 6], [92, *[IMAGE] * 3, 93, 6, 7, 8, 9]]
    pixels = inputs["pixel_values"][: int(images.prod(1).sum())]
    found = {"input_ids": torch.tensor(ids), "pixel_values": pixels, "image_grid_thw": images}
    kinds = (found["input_ids"] == IMAGE).int()
    return found | {"mm_token_type_ids": kinds, "attention_mask": torch.ones_like(kinds)}


def unpadded_sounds() -> dict[str, Any]:
    """The first sample alone."""
    inputs = audio_inputs()
    real = inputs["attention_mask"][0].bool()
    one = {name: inputs[name][:1, real] for name in ("input_ids", "attention_mask")}
    clips = {name: inputs[name][:2] for name in inputs if name not in one}
    return one | clips


KINDS = {"vision": (vision_model, unpadded_images), "audio": (audio_model, unpadded_sounds)}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("wrapped", [True, False])
def test_tokens_alone_are_enough(kind: str, wrapped: bool) -> None:
    make, make_inputs = KINDS[kind]
    plain, inputs = make(), make_inputs()
    model = ml.wrap(plain) if wrapped else plain
    hooks = len(plain._forward_pre_hooks)
    model.modality_layout = ml.ModalityLayout({"image": IMAGE, "video": 91, "audio": AUDIO})
    ids = inputs["input_ids"]
    rest = {name: value for name, value in inputs.items() if name != "input_ids"}
    name = "input" if wrapped else "input_ids"
    expected = logits(plain, **inputs)
    with ml.bind(model, inputs) as bound_to:
        assert bound_to is model
        assert torch.equal(logits(model, ids), expected)
        assert torch.equal(logits(model, **{name: ids}), expected)
        assert torch.equal(logits(plain, input_ids=ids), expected)
        assert torch.equal(logits(model, ids, **rest), expected)
        tiled = logits(model, ids.repeat(2, 1))
        torch.testing.assert_close(tiled, expected.repeat(2, 1, 1), atol=1e-5, rtol=0)
        if wrapped:
            assert torch.equal(model.run_with_hooks(ids, fwd_hooks=[]), expected)
            cached, _ = model.run_with_cache(ids)  # which computes attention patterns
            torch.testing.assert_close(cached, expected, atol=1e-5, rtol=0)
    assert torch.equal(logits(plain, **inputs), expected)
    assert len(plain._forward_pre_hooks) == hooks


def test_what_are_no_inputs(sample: Any) -> None:
    model, inputs = sample
    (asked,) = ml.datasets.load("easy-vqa", limit=1)
    messages, wanted = asked.messages, r".*ml\.bind\(model, ml\.inputs\(model, messages\)\)"
    cases: tuple[tuple[tuple[Any, ...], str], ...] = (
        ((), "no inputs beside the model" + wanted),
        ((messages,), "chat messages" + wanted),
        (tuple(messages), "chat messages" + wanted),
        (([messages, messages],), "chat messages" + wanted),
        ((inputs["input"],), rf"a tensor of shape \[1, {inputs['input'].shape[1]}\]" + wanted),
        ((inputs, None), "None of type NoneType" + wanted),
        (("What is this?",), "'What is this\\?' of type str" + wanted),
        (([inputs, inputs],), r"not in a list: ml\.bind\(model, \*inputs\)"),
        (({"input_ids": [[1, 2]]},), r"a tensor \[batch pos\], not as list.*return_tensors='pt'"),
    )
    hooks = len(model.original_model._forward_pre_hooks)
    for given, said in cases:
        with pytest.raises(TypeError, match=said), ml.bind(model, *given):
            pass
    assert len(model.original_model._forward_pre_hooks) == hooks


def test_other_tokens(sample: Any) -> None:
    """Text before the picture, which moves it, and a picture of one's own."""
    model, inputs = sample
    ids = inputs["input"]
    before = ids[:, :1].repeat(1, 3)
    longer = torch.cat([before, ids], 1)
    kinds = inputs["mm_token_type_ids"]
    whole = {
        **inputs,
        "input": longer,
        "attention_mask": torch.ones_like(longer),
        "mm_token_type_ids": torch.cat([torch.zeros_like(before), kinds], 1),
    }
    moved = {**inputs, "input": ids.flip(1), "mm_token_type_ids": kinds.flip(1)}
    darker = {**inputs, "pixel_values": inputs["pixel_values"] - 1}
    words = torch.arange(7, 16)[None]
    with ml.bind(model, inputs):
        assert torch.equal(logits(model, longer), logits(model, **whole))
        assert torch.equal(logits(model, ids.flip(1)), logits(model, **moved))
        own, alone = logits(model, **darker), logits(model, words)
    assert torch.equal(own, logits(model, **darker))
    assert torch.equal(alone, logits(model, words))
    assert not torch.equal(own, logits(model, **inputs))


def test_patching(sample: Any, other: dict[str, Any]) -> None:
    """As by hooks of one's own on passes with all inputs."""
    model, inputs = sample
    tokens = inputs["input"]
    assert torch.equal(other["input"], tokens)
    kinds = model.modality_layout.masks(tokens)
    pos = int(kinds["image"][0].nonzero()[3])
    answers = logits(model, **inputs)[0, -1].topk(2).indices

    def metric(found: torch.Tensor) -> torch.Tensor:
        return found[0, -1, answers[0]] - found[0, -1, answers[1]]

    with ml.bind(model, other), torch.no_grad():
        _, clean = model.run_with_cache(tokens)
    with ml.bind(model, inputs), torch.no_grad():
        found = patching.get_act_patch_resid_pre(model, tokens, clean, metric)

    def patch(x: torch.Tensor, hook: Any) -> torch.Tensor:
        x[:, pos] = clean["blocks.2.hook_resid_pre"][:, pos]
        return x

    rest = {name: value for name, value in inputs.items() if name != "input"}
    hooks = [("blocks.2.hook_resid_pre", patch)]
    with torch.no_grad():
        by_hand = metric(model.run_with_hooks(tokens, fwd_hooks=hooks, **rest))
        intact = metric(model(**inputs))
    assert found[2, pos] == by_hand
    assert by_hand != intact
    assert found.shape == (model.cfg.n_layers, tokens.shape[1])


def test_the_residual_stream_decomposes_at_media_too(sample: Any) -> None:
    model, inputs = sample
    images = model.modality_layout.masks(inputs["input"])["image"][0]
    with torch.no_grad():
        expected, unbound = model.run_with_cache(**inputs)
        with ml.bind(model, inputs):
            found, cache = model.run_with_cache(inputs["input"])
            _, given = model.run_with_cache(**inputs)
    assert torch.equal(found, expected)
    last = cache["blocks.5.hook_resid_post"][0]
    for one in (cache, given):
        total = one.decompose_resid(layer=-1).sum(0)[0]
        torch.testing.assert_close(total, last, atol=1e-4, rtol=0)
        assert torch.equal(one["hook_embed"], one["blocks.0.hook_resid_pre"])
    wrong = unbound.decompose_resid(layer=-1).sum(0)[0]
    assert (wrong - last)[images].abs().max() > 1
    assert torch.equal(unbound["hook_embed"][0][~images], cache["hook_embed"][0][~images])
    # A hook writes what enters the first layer, once.
    doubled = [("hook_embed", lambda x, hook: 2 * x)]
    by_layer = [("blocks.0.hook_resid_pre", lambda x, hook: 2 * x)]
    with torch.no_grad(), ml.bind(model, inputs):
        one = model.run_with_hooks(inputs["input"], fwd_hooks=doubled)
        assert torch.equal(one, model.run_with_hooks(inputs["input"], fwd_hooks=by_layer))
    assert not torch.equal(one, expected)


def test_ablation_sees_the_media(sample: Any) -> None:
    model, inputs = sample
    for site, options in (("llm", {"at": "image"}), ("vision", {"value": "min"})):
        neurons = ~ml.NeuronSet.of([(0, 1)], model, site)
        with ml.ablate(model, neurons, **options):
            expected = logits(model, **inputs)
            with ml.bind(model, inputs):
                assert torch.equal(logits(model, inputs["input"]), expected)
        with ml.bind(model, inputs), ml.ablate(model, neurons, **options):
            assert torch.equal(logits(model, inputs["input"]), expected)
            hooks = [] if site == "vision" else ml.ablation_hooks(model, neurons, **options)
        if hooks:
            with ml.bind(model, inputs), torch.no_grad():
                assert torch.equal(model.run_with_hooks(inputs["input"], fwd_hooks=hooks), expected)


def test_generation_inside(sample: Any) -> None:
    model, inputs = sample
    (one,) = ml.datasets.load("easy-vqa", limit=1)
    expected = ml.generate(model, one.messages, 3)
    with ml.bind(model, inputs):
        assert ml.generate(model, one.messages, 3) == expected
        ids = inputs["input"]
        found = model.original_model.generate(ids, max_new_tokens=3, do_sample=False)
        text = model.processor.batch_decode(found[:, ids.shape[1] :], skip_special_tokens=True)
        assert text == [expected]
        with pytest.raises(ValueError, match=r"position_ids.*use ml\.generate"):
            logits(model, ids, position_ids=torch.arange(ids.shape[1])[None])


def test_contexts_leave_no_trace(sample: Any, other: dict[str, Any]) -> None:
    model, inputs = sample
    expected = logits(model, **inputs), logits(model, **other)
    with ml.bind(model, inputs):
        with pytest.raises(KeyError), ml.bind(model, other):  # noqa: PT012
            assert torch.equal(logits(model, inputs["input"]), expected[1])
            raise KeyError
        assert torch.equal(logits(model, inputs["input"]), expected[0])
    assert not torch.equal(logits(model, inputs["input"]), expected[0])


def test_refusals(sample: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = sample
    ids = inputs["input"]
    image = model.modality_layout.media["image"]
    with ml.bind(model, inputs):
        with pytest.raises(ValueError, match=r"17 placeholders of image .* bound 16\."):
            logits(model, torch.cat([ids, ids.new_tensor([[image]])], 1))
        beside_text = logits(model, torch.cat([torch.full_like(ids, 5), ids]))
        torch.testing.assert_close(beside_text[1:], logits(model, ids), atol=1e-5, rtol=0)
    padded = dict(inputs, attention_mask=inputs["attention_mask"].clone())
    padded["attention_mask"][:, 0] = 0
    with pytest.raises(ValueError, match=r"without padding.* one sample at a time"):
        ml.bind(model, padded).__enter__()
    with pytest.raises(ValueError, match=r"'input' or 'input_ids' and was given pixel_values"):
        ml.bind(model, {"pixel_values": 1}).__enter__()
    monkeypatch.setattr("miner_lens.models.access.layout_for", lambda *_: None)
    with pytest.raises(ValueError, match="No modality layout"):
        ml.bind(vision_model(), {"input_ids": ids}).__enter__()


def test_copies_are_bound_to_nothing(sample: Any) -> None:
    model, inputs = sample
    with ml.bind(model, inputs):
        copied = copy.deepcopy(model)
    assert torch.equal(logits(copied, inputs["input"]), logits(model, inputs["input"]))
    assert torch.equal(logits(copied, **inputs), logits(model, **inputs))


ORDERS = ([0, 1, 2], [2, 0, 1], [0, 0, 2], [2], [1, 2], [0, 1, 2, 0, 1, 2], [1])


def unpadded(family: str) -> tuple[Any, dict[str, Any]]:
    """Three prompts with two media, none and one; text in the place of padding."""
    model, inputs = getattr(families, family)()
    padding = inputs["attention_mask"] == 0
    ids = inputs["input_ids"].masked_fill(padding, 7)
    return model, inputs | {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_audio", "llava", "llava_next", "gemma3"])
def test_rows_have_their_own_media(family: str) -> None:
    """Shuffled, repeated and in parts, as tools pass them."""
    model, inputs = unpadded(family)
    ids, expected = inputs["input_ids"], logits(model, **inputs)
    bridge = ml.wrap(model)
    with ml.bind(bridge, inputs):
        for order in ORDERS:
            found = logits(bridge, ids[torch.tensor(order)])
            torch.testing.assert_close(found, expected[order], atol=2e-5, rtol=0)
        first = ids.clone()
        ids[0] = ids[2]  # the owner may write into tensors
        found = logits(bridge, ids)
        torch.testing.assert_close(found, expected[[2, 1, 2]], atol=2e-5, rtol=0)
        ids[:] = first
    torch.testing.assert_close(logits(model, **inputs), expected, atol=2e-5, rtol=0)


def test_media_that_may_be_of_rows_or_of_a_heap() -> None:
    """Five axes are tiles of an image, or images of a row of which some are filled up."""
    model, inputs = unpadded("llava")
    inputs["pixel_values"] = inputs["pixel_values"][:, None]
    bridge = ml.wrap(model)
    with ml.bind(bridge, inputs):
        for order in ([1, 2, 0], [0]):
            with pytest.raises(ValueError, match=r"whose parts of 'pixel_values'.*\*inputs"):
                logits(bridge, inputs["input_ids"][order])


def test_several_inputs_of_different_length() -> None:
    inputs, model = one_image(), vision_model()
    more = unpadded_images()
    bridge = ml.wrap(model)
    expected = [logits(model, **one) for one in (inputs, more)]
    with ml.bind(bridge, inputs, more):
        for one, wanted in zip((inputs, more), expected, strict=True):
            ids = one["input_ids"]
            assert torch.equal(logits(bridge, ids), wanted)
            torch.testing.assert_close(logits(bridge, ids[-1:]), wanted[-1:], atol=1e-5, rtol=0)
        # Padded by the tool, which says so.
        ids = torch.tensor([[0, *inputs["input_ids"][0]], more["input_ids"][1].tolist()])
        mask = (ids != 0).long()
        found = logits(bridge, ids, attention_mask=mask)
    torch.testing.assert_close(found[:1, 1:], expected[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(found[1:], expected[1][1:], atol=1e-5, rtol=0)


def test_two_media_under_the_same_tokens(sample: Any, other: dict[str, Any]) -> None:
    model, inputs = sample
    pair = [logits(model, **one) for one in (inputs, other)]
    with ml.bind(model, inputs, other):
        for one, expected in zip((inputs, other), pair, strict=True):
            assert torch.equal(logits(model, one["input"]), expected)
            assert torch.equal(logits(model, one["input"][0:1]), expected)
            twice = logits(model, one["input"].expand(2, -1))
            torch.testing.assert_close(twice, expected.expand(2, -1, -1), atol=1e-5, rtol=0)
        for tokens in (inputs["input"].clone(), torch.cat([inputs["input"], other["input"]])):
            with pytest.raises(ValueError, match=r"Row 0 .* several rows .* no copies"):
                logits(model, tokens)
    both = {name: torch.cat([inputs[name], other[name]]) for name in inputs}
    with ml.bind(model, both):
        found = logits(model, both["input"])
        torch.testing.assert_close(found, torch.cat(pair), atol=1e-5, rtol=0)
        torch.testing.assert_close(logits(model, both["input"][1:]), pair[1], atol=1e-5, rtol=0)
        with pytest.raises(ValueError, match="several rows"):
            logits(model, both["input"].flip(0))
    shared = {**other, "input": inputs["input"]}
    with ml.bind(model, inputs, shared), pytest.raises(ValueError, match="a tensor of its own"):
        logits(model, inputs["input"])
    again = {name: value.clone() for name, value in inputs.items()}
    with ml.bind(model, inputs, again):  # equal media are no ambiguity
        assert torch.equal(logits(model, inputs["input"].clone()), pair[0])


@pytest.mark.parametrize("family", ["gemma3", "qwen3_vl"])
def test_starting_later_where_layers_read_the_inputs(family: str) -> None:
    """Masks by the kind of tokens, and features of pictures that are added in layers."""
    model = getattr(families, family)()[0]
    row = {"gemma3": [8, IMAGE, IMAGE, IMAGE, IMAGE, 9], "qwen3_vl": [8, START, IMAGE, END, 9]}
    ids = torch.tensor([row[family]])
    kinds = {"gemma3": "token_type_ids", "qwen3_vl": "mm_token_type_ids"}[family]
    inputs: dict[str, Any] = {"input_ids": ids, kinds: (ids == IMAGE).int()}
    if family == "gemma3":
        inputs["pixel_values"] = torch.randn(1, 3, 8, 8)
    else:
        inputs |= {"pixel_values": torch.randn(4, 24), "image_grid_thw": torch.tensor([[1, 2, 2]])}
    expected = logits(model, **inputs)
    bridge = ml.wrap(model)
    rest = {name: value for name, value in inputs.items() if name != "input_ids"}
    _, cache = bridge.run_with_cache(ids, **rest)
    for layer in (0, 1):
        residual = cache[f"blocks.{layer}.hook_in"].detach()
        with ml.bind(bridge, inputs):
            found = logits(bridge, residual, start_at_layer=layer)
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)
        with pytest.raises(ValueError, match="start_at_layer goes on"):
            logits(bridge, residual, start_at_layer=layer)

"""Attention that is cut, against masks made by hand and against the patterns themselves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import miner_lens as ml
from miner_lens.models import access
from tests import families


@pytest.fixture(scope="module")
def samples() -> list[ml.Sample]:
    pictures = ml.datasets.load("easy-vqa", limit=2, ask="image")
    return [*pictures, ml.datasets.load("easy-vqa", limit=1, ask="text")[0]]


def prepared(model: Any, sample: ml.Sample) -> tuple[dict[str, Any], dict[str, Tensor]]:
    inputs = ml.inputs(model, sample.messages)
    inputs["input_ids"] = inputs.pop("input")
    return inputs, access.layout(model).masks(inputs["input_ids"])


def logits(model: Any, inputs: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        return model.original_model(**inputs, use_cache=False).logits


@pytest.mark.parametrize("modality", ["image", "text", "prompt"])
def test_everywhere_equals_a_mask_by_hand(shapes: Any, samples: Any, modality: str) -> None:
    inputs, masks = prepared(shapes, samples[0])
    length = inputs["input_ids"].shape[1]
    decoder, seen = shapes.original_model.get_decoder(), []
    handle = decoder.register_forward_pre_hook(
        lambda _, __, kwargs: seen.append(kwargs["position_ids"]), with_kwargs=True
    )
    before = logits(shapes, inputs)
    handle.remove()
    mask = torch.ones(length, length, dtype=torch.bool).tril()
    mask[-2:, masks[modality][0]] = False
    mask[-2, -2] = mask[-1, -1] = True
    by_hand = inputs | {"attention_mask": mask[None, None], "position_ids": seen[0]}
    expected = logits(shapes, by_hand)
    with ml.knockout(shapes, modality, last=2):
        torch.testing.assert_close(logits(shapes, inputs), expected, atol=1e-5, rtol=1e-5)
    assert (expected[:, -1] - before[:, -1]).abs().max() > 1e-3
    assert torch.equal(logits(shapes, inputs), before)


def test_patterns_have_no_attention_there(shapes: Any, samples: Any) -> None:
    inputs, masks = prepared(shapes, samples[0])
    image, names = masks["image"][0], [point.name for point in ml.pattern_points(shapes)]
    given = inputs | {"input": inputs["input_ids"]}
    del given["input_ids"]

    def patterns() -> list[Tensor]:
        rest = {k: v for k, v in given.items() if k != "input"}
        _, cache = shapes.run_with_cache(given["input"], names_filter=names, **rest)
        return [cache[name][0] for name in names]

    before = patterns()
    with ml.knockout(shapes, "image", layers=[1, 2]):
        after = patterns()
    for layer in range(6):
        gone = after[layer][:, -1, image].sum(-1)
        assert bool((gone == 0).all()) == (layer in (1, 2))
        torch.testing.assert_close(after[layer].sum(-1), torch.ones_like(after[layer][..., 0]))
    torch.testing.assert_close(after[0], before[0])
    torch.testing.assert_close(after[1][:, :-1], before[1][:, :-1])


def test_padding_and_batches(shapes: Any, samples: Any) -> None:
    from miner_lens.models.collate import collate

    apart = [prepared(shapes, sample)[0] for sample in samples]
    together = collate(apart, shapes.processor.tokenizer.pad_token_id)
    with ml.knockout(shapes, "image", layers=range(3)):
        alone = torch.cat([logits(shapes, inputs)[:, -1] for inputs in apart])
        torch.testing.assert_close(logits(shapes, together)[:, -1], alone, atol=1e-5, rtol=1e-5)
    inputs = apart[2]  # without an image
    with ml.knockout(shapes, "image"):
        torch.testing.assert_close(logits(shapes, inputs), alone_of(shapes, inputs))


def alone_of(model: Any, inputs: dict[str, Any]) -> Tensor:
    return logits(model, inputs)


def test_generation_goes_on_cut_off(shapes: Any, samples: Any) -> None:
    """Token by token without a cache, each new one cut off as well."""
    inputs, _ = prepared(shapes, samples[0])
    with ml.knockout(shapes, "image"):
        generated = shapes.original_model.generate(**inputs, do_sample=False, max_new_tokens=4)
    ids = inputs["input_ids"]
    for count in range(1, generated.shape[1] - ids.shape[1] + 1):
        longer = inputs | {"input_ids": generated[:, : ids.shape[1] + count - 1]}
        longer["attention_mask"] = torch.ones_like(longer["input_ids"])
        if "mm_token_type_ids" in longer:
            extra = longer["input_ids"].shape[1] - ids.shape[1]
            types = torch.nn.functional.pad(inputs["mm_token_type_ids"], (0, extra))
            longer["mm_token_type_ids"] = types
        with ml.knockout(shapes, "image", last=count):
            best = logits(shapes, longer)[0, -1].argmax()
        assert best == generated[0, ids.shape[1] + count - 1]


def test_it_ends_and_composes(shapes: Any, samples: Any) -> None:
    inputs, _ = prepared(shapes, samples[0])
    before = logits(shapes, inputs)
    with pytest.raises(KeyError), ml.knockout(shapes, "image"):
        raise KeyError
    assert torch.equal(logits(shapes, inputs), before)
    with ml.knockout(shapes, "image", layers=[]):
        assert torch.equal(logits(shapes, inputs), before)
    neurons = ml.NeuronSet.of([(1, n) for n in range(100)], shapes)
    with ml.knockout(shapes, "image"), ml.ablate(shapes, neurons):
        both = logits(shapes, inputs)
    with ml.ablate(shapes, neurons), ml.knockout(shapes, "image"):
        assert torch.equal(logits(shapes, inputs), both)


def test_what_cannot_be(shapes: Any, samples: Any) -> None:
    for options, message in (
        ({"modality": "smell"}, "no modality 'smell'"),
        ({"modality": "image", "layers": [6]}, "There is no layer 6"),
        ({"modality": "image", "last": 0}, "last must be at least 1"),
    ):
        with pytest.raises(ValueError, match=message), ml.knockout(shapes, **options):
            pass
    decoder = shapes.original_model.get_decoder()
    embedded = torch.zeros(1, 4, 128)
    with pytest.raises(ValueError, match="called with input_ids"), ml.knockout(shapes, "image"):
        decoder(inputs_embeds=embedded, position_ids=torch.arange(4).expand(3, 1, 4))


@pytest.mark.parametrize("family", ["qwen2_vl", "llava"])
def test_the_loop_of_transformer_lens_cuts_what_hugging_face_s_does(family: str) -> None:
    model, inputs = getattr(families, family)()
    bridge = ml.wrap(model)
    options = {"max_new_tokens": 4, "do_sample": False, "output_logits": True}
    given = {"input" if name == "input_ids" else name: value for name, value in inputs.items()}
    with ml.knockout(bridge, "image"):
        expected = model.generate(
            **inputs, **options, eos_token_id=None, return_dict_in_generate=True
        ).logits
        for cached in (True, False):
            found = bridge.generate(
                **given, **options, stop_at_eos=False, verbose=False, use_past_kv_cache=cached
            ).logits
            for ours, theirs in zip(found, expected, strict=True):
                torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=0)

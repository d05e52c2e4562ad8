"""Eighteen families of models, each read off itself and held against plain Hugging Face."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

import miner_lens as ml
from miner_lens.models import access as models
from miner_lens.models import sites
from miner_lens.models.inside import hf_model_of
from tests.families import Inputs, build
from tests.models.test_inside import shape_of
from tests.parts import FAMILIES, Part
from tests.scoring.test_kernels import twin
from tests.towers import TEXT

# Those that TransformerLens has an adapter for, which computes attention in its own way.
REBUILT = {
    "llava",
    "llava_next",
    "llava_onevision",
    "qwen2_5_vl",
    "qwen3_vl",
    "gemma3",
    "mistral3",
    "llama",
}


class Plain:
    """A plain Hugging Face model of a family, and what was measured on it before it was wrapped."""

    def __init__(self, name: str) -> None:
        self.name, self.parts = name, FAMILIES[name].parts
        self.model, self.inputs = FAMILIES[name].make()
        self.untouched = copy.deepcopy(self.model)
        self.logits = logits(self.untouched, self.inputs)
        for one in (self.model, self.untouched):
            generated(one, self.inputs)  # has Hugging Face put hooks of its own onto some models
        self.real = self.inputs["attention_mask"].bool()
        self.bridge = ml.wrap(self.model)

    def close(self, ours: Tensor, theirs: Tensor, tolerance: float = 1e-5) -> None:
        """Equal at real tokens, to the last bit where attention is Hugging Face's own."""
        torch.testing.assert_close(ours[self.real], theirs[self.real], atol=tolerance, rtol=0)


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> Plain:
    return Plain(request.param)


def logits(model: Any, inputs: Inputs) -> Tensor:
    with torch.no_grad():
        found: Tensor = hf_model_of(model)(**inputs).logits
    return found


def layers(model: Any, part: Part) -> list[nn.Module]:
    if isinstance(part.layers, str):
        return list(model.get_submodule(part.layers))
    return [model.get_submodule(name) for name in part.layers or ("",)]


class Spy:
    """X, queries, keys and the masks that attention was given, seen by means of torch alone."""

    def __init__(self, model: Any, inputs: Inputs, part: Part) -> None:
        found = layers(model, part)
        self.x: list[list[Tensor]] = [[] for _ in found]
        self.calls: list[list[tuple[Tensor, Tensor, Tensor | None]]] = [[] for _ in found]
        attentions = {
            id(layer.get_submodule(part.attention)): number
            for number, layer in enumerate(found)
            if part.attention is not None
        }

        def attend(
            module: Any, q: Tensor, k: Tensor, v: Tensor, attention_mask: Any, **kwargs: Any
        ) -> Any:
            number = attentions.get(id(module))
            if number is not None:
                self.calls[number].append((q * kwargs["scaling"], k, attention_mask))
            return sdpa_attention_forward(module, q, k, v, attention_mask, **kwargs)

        AttentionInterface.register("spy", attend)
        AttentionMaskInterface.register("spy", sdpa_mask)
        for number, layer in enumerate(found):
            layer.get_submodule(part.activation).register_forward_hook(
                lambda m, a, out, number=number: self.x[number].append(out)
            )
        model.set_attn_implementation("spy")
        logits(model, inputs)


def pattern(q: Tensor, k: Tensor, mask: Tensor | None = None) -> Tensor:
    """The head mean of softmax(QK^T), the scale being in Q."""
    k = k.repeat_interleave(len(q) // len(k), 0)
    scores = q @ k.mT
    if mask is not None:
        scores = (
            scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
        )
    return scores.softmax(-1).nan_to_num().mean(0)


def of_decoder(plain: Plain, masks: dict[str, Tensor]) -> Tensor:
    """Scores by the definition, [metric modality layer neuron]."""
    spy = Spy(copy.deepcopy(plain.untouched), plain.inputs, plain.parts["llm"])
    scores = []
    for (x,), ((q, k, _),) in zip(spy.x, spy.calls, strict=True):
        samples = []
        for sample, real in enumerate(plain.real):
            p = pattern(q[sample][:, real], k[sample][:, real])
            own = torch.stack([mask[sample, real] for mask in masks.values()])
            samples.append(twin(x[sample, real], p, own))
        scores.append(torch.stack(samples).mean(0))
    return torch.stack(scores, 2).float()


def of_tower(plain: Plain, part: Part) -> tuple[list[str], Tensor]:
    """Modalities, and scores by the definition, [metric modality layer neuron]."""
    spy = Spy(copy.deepcopy(plain.untouched), plain.inputs, part)
    scores = []
    for x, calls in zip(spy.x, spy.calls, strict=True):
        blocks = [
            pattern(q, k, None if mask is None else mask[min(n, len(mask) - 1)])
            for many, keys, mask in calls
            for n, (q, k) in enumerate(zip(many, keys, strict=True))
        ]
        whole = torch.block_diag(*blocks) if blocks else None
        columns, first = [], 0
        for heap, (_, items) in zip(x, part.items, strict=True):
            heap = heap.flatten(0, -2)
            owner = torch.tensor([sample for sample, rows in items for _ in range(rows)])
            assert len(owner) == len(heap)
            owner[list(part.padding)] = -1
            p = torch.zeros(len(heap), len(heap))
            if whole is not None:
                p = whole[first : first + len(heap), first : first + len(heap)]
            total = torch.zeros(5, heap.shape[1], dtype=torch.float64)
            for sample in set(owner.tolist()) - {-1}:
                total += twin(heap, p, (owner == sample)[None])[:, 0]
            if whole is None:
                total[3:] = 0  # where nothing attends, there is nothing to weigh tokens by
            columns.append(total / len(plain.real))
            first += len(heap)
        scores.append(torch.stack(columns, 1))
    return [modality for modality, _ in part.items], torch.stack(scores, 2).float()


def test_logits(family: Plain) -> None:
    ours = logits(family.bridge, family.inputs)
    family.close(ours, family.logits, 1e-5 if family.name in REBUILT else 0)


def test_sites_are_those_that_are_there(family: Plain) -> None:
    found = sites.sites(family.model)
    assert set(found) == set(family.parts)
    for name, part in family.parts.items():
        mlps = found[name].mlps(family.model)
        theirs = layers(family.untouched, part)
        assert len(mlps) == len(theirs)
        assert mlps[0].down.in_features == theirs[0].get_submodule(part.down).in_features
        points = [found[name].activation_point(layer) for layer in range(len(mlps))]
        assert set(points) <= set(family.bridge.hook_dict)
        assert len(set(points)) == len(points)


@pytest.mark.filterwarnings("ignore:TransformerLens rebuilds")
def test_scores_of_the_decoder(family: Plain) -> None:
    masks = models.layout(family.bridge).masks(family.inputs["input_ids"], family.real)
    data = [(family.inputs, masks)]
    scores = ml.mine(family.bridge, data, progress=False)
    expected = of_decoder(family, masks)
    torch.testing.assert_close(scores.values, expected, atol=1e-5, rtol=0)
    assert set(scores.modalities) >= {"text", "special", "prompt"}


@pytest.mark.filterwarnings("ignore:TransformerLens rebuilds")
def test_scores_of_towers(family: Plain) -> None:
    masks = {"prompt": family.real}
    for site, part in family.parts.items():
        if site == "llm":
            continue
        scores = ml.mine(family.bridge, [(family.inputs, masks)], progress=False, site=site)
        modalities, expected = of_tower(family, part)
        assert [m for m, n in zip(scores.modalities, scores.occurrences, strict=True) if n] == (
            modalities
        )
        places = [scores.modalities.index(modality) for modality in modalities]
        ours = scores.values[:, places]
        torch.testing.assert_close(ours, expected, atol=1e-5, rtol=0)
        assert ours[:3].amax() > 0


def test_ablation_is_zeroed_weights_and_leaves_no_trace(family: Plain) -> None:
    before = logits(family.bridge, family.inputs)
    for site, part in family.parts.items():
        mlps = models.mlps(family.bridge, site)
        width = mlps[0].down.in_features
        chosen = [(layer, neuron) for layer in range(len(mlps)) for neuron in range(0, width, 3)]
        neurons = ml.NeuronSet(chosen, layers=len(mlps), neurons=width, site=site)
        edited = zeroed(family, part)
        theirs = logits(edited, family.inputs)
        with ml.ablate(family.bridge, neurons):
            family.close(logits(family.bridge, family.inputs), theirs)
            tokens = generated(family.bridge, family.inputs)
        assert torch.equal(tokens, generated(edited, family.inputs))
        with ml.ablate(family.bridge, neurons, "min"):
            least = logits(family.bridge, family.inputs)
        assert least[family.real].isfinite().all()
        assert not torch.allclose(least[family.real], before[family.real])
        assert torch.equal(logits(family.bridge, family.inputs), before)


def zeroed(family: Plain, part: Part) -> Any:
    edited = copy.deepcopy(family.untouched)
    with torch.no_grad():
        for layer in layers(edited, part):
            layer.get_submodule(part.down).weight[:, ::3] = 0
    return edited


def generated(model: Any, inputs: Inputs) -> Tensor:
    options = {"do_sample": False, "max_new_tokens": 3, "pad_token_id": 0}
    with torch.no_grad():
        tokens: Tensor = hf_model_of(model).generate(**inputs, **options)
    return tokens


@contextmanager
def unwrapped(family: Plain) -> Iterator[Any]:
    plain = ml.unwrap(family.bridge)
    try:
        yield plain
    finally:
        family.bridge = ml.wrap(plain)


def test_unwrapped_is_as_never_wrapped(family: Plain) -> None:
    with unwrapped(family) as plain:
        assert shape_of(plain) == shape_of(family.untouched)
        assert torch.equal(logits(plain, family.inputs), family.logits)


def deepseek() -> Any:
    """Of its queries and keys only a part is rotated."""
    ranks = {"q_lora_rank": 8, "kv_lora_rank": 8, "v_head_dim": 8}
    heads = {"qk_rope_head_dim": 4, "qk_nope_head_dim": 6, "num_key_value_heads": 4}
    return build("DeepseekV3ForCausalLM", **TEXT | ranks | heads | {"first_k_dense_replace": 2})


@pytest.mark.filterwarnings("ignore:TransformerLens rebuilds")
@pytest.mark.parametrize(
    ("make", "act"),
    [
        (lambda: build("Phi3ForCausalLM", **TEXT), "mlp.activation_fn"),
        (lambda: build("Glm4ForCausalLM", **TEXT | {"head_dim": 8}), "mlp.activation_fn"),
        (deepseek, "mlp.act_fn"),
    ],
    ids=["phi3", "glm4", "deepseek_v3"],
)
def test_attention_that_is_rebuilt_in_other_ways(make: Any, act: str) -> None:
    model, inputs = make(), FAMILIES["llama"].make()[1]
    real = inputs["attention_mask"].bool()
    parts = {"llm": Part("model.layers", act, "self_attn", "mlp.down_proj")}
    plain = SimpleNamespace(untouched=copy.deepcopy(model), inputs=inputs, parts=parts, real=real)
    bridge = ml.wrap(model)
    masks = {"text": real}
    expected = of_decoder(plain, masks)  # type: ignore[arg-type]
    for one in (bridge, copy.deepcopy(bridge)):
        scores = ml.mine(one, [(inputs, masks)], progress=False)
        torch.testing.assert_close(scores.values, expected, atol=1e-5, rtol=0)
    theirs = logits(plain.untouched, inputs)[real]
    torch.testing.assert_close(logits(bridge, inputs)[real], theirs, atol=1e-5, rtol=0)
    ml.unwrap(bridge)
    assert shape_of(model) == shape_of(plain.untouched)

"""Neurons of the towers: scored by the definition, switched off as by an edit of the weights."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, AutoConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

import miner_lens as ml
from miner_lens.models import access as models
from miner_lens.models import sites
from miner_lens.models.inside import hf_model_of
from miner_lens.reporting import plots
from tests import towers
from tests.scoring.test_kernels import twin

SITES = ("vision", "projector", "audio")
# Of each sample and modality, the items in the order in which the tower gets them.
ITEMS = {
    "image": {0: [0, 1], 2: [2]},
    "video": {2: [0]},
    "audio": {0: [0, 1], 2: [2]},
}
FRAMES = (20, 7, 11)


def plain(site: str) -> tuple[Any, dict[str, Any]]:
    if site == "audio":
        return towers.audio_model(), towers.audio_inputs()
    return towers.vision_model(), towers.vision_inputs()


@pytest.fixture(params=SITES)
def case(request: pytest.FixtureRequest) -> tuple[str, Any, dict[str, Any]]:
    """A site, a plain Hugging Face model that has it, and inputs."""
    return (request.param, *plain(request.param))


def masks_of(model: Any, inputs: dict[str, Any]) -> Any:
    return models.layout(model).masks(inputs["input_ids"], inputs["attention_mask"])


def mine(model: Any, inputs: dict[str, Any], **options: Any) -> ml.ImportanceScores:
    return ml.mine(model, [(inputs, masks_of(model, inputs))], progress=False, **options)


def logits(model: Any, inputs: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        result: Tensor = hf_model_of(model)(**inputs).logits
    return result


class Spy:
    """What the tower computes, seen by a torch hook and by an attention function of its own."""

    def __init__(self, model: Any, inputs: dict[str, Any], site: str) -> None:
        self.x: dict[int, list[Tensor]] = {}
        self.heads: dict[int, list[tuple[Tensor, Tensor]]] = {}
        where: Any = model.model.audio_tower if site == "audio" else model.model.visual
        layers = list(where.layers if site == "audio" else where.blocks)
        if site == "projector":
            activations, attentions = [where.merger.mlp[1]], []
        else:
            activations = [b.activation_fn if site == "audio" else b.mlp.act for b in layers]
            attentions = [b.self_attn if site == "audio" else b.attn for b in layers]
        places = {id(module): layer for layer, module in enumerate(attentions)}

        def attend(
            module: Any, q: Tensor, k: Tensor, v: Tensor, attention_mask: Any, **kwargs: Any
        ) -> Any:
            if id(module) in places:
                self.heads.setdefault(places[id(module)], []).append((q * kwargs["scaling"], k))
            return sdpa_attention_forward(module, q, k, v, attention_mask, **kwargs)

        AttentionInterface.register("spy", attend)
        AttentionMaskInterface.register("spy", sdpa_mask)
        config = model.config.audio_config if site == "audio" else model.config.vision_config
        handles = [
            module.register_forward_hook(
                lambda m, a, out, layer=layer: self.x.setdefault(layer, []).append(out)
            )
            for layer, module in enumerate(activations)
        ]
        former, config._attn_implementation = config._attn_implementation, "spy"
        try:
            logits(model, inputs)
        finally:
            config._attn_implementation = former
            for handle in handles:
                handle.remove()


def expected(model: Any, inputs: dict[str, Any], site: str) -> tuple[Tensor, Tensor]:
    """Scores and means by the definition: [metric modality layer neuron], [modality ...]."""
    spy = Spy(model, inputs, site)
    modalities = ("audio",) if site == "audio" else ("image", "video")
    scores, means = [], []
    for layer in sorted(spy.x):
        columns, averages = [], []
        for call, modality in enumerate(modalities):
            total = torch.zeros(5, spy.x[layer][0].shape[-1], dtype=torch.float64)
            mean = torch.zeros(spy.x[layer][0].shape[-1])
            for items in ITEMS[modality].values():
                x, blocks = collect(spy, layer, call, modality, items, inputs, site)
                pattern = torch.block_diag(*blocks) if blocks else torch.zeros(len(x), len(x))
                whole = torch.ones(1, len(x), dtype=torch.bool)
                metrics = twin(x, pattern, whole)[:, 0]
                if not blocks:
                    metrics[3:] = 0  # where nothing attends, there is nothing to weigh tokens by
                total += metrics
                mean += x.mean(0)
            columns.append(total / 3)
            averages.append(mean / len(ITEMS[modality]))
        scores.append(torch.stack(columns, 1))
        means.append(torch.stack(averages))
    return torch.stack(scores, 2).float(), torch.stack(means, 1)


def collect(
    spy: Spy,
    layer: int,
    call: int,
    modality: str,
    items: list[int],
    inputs: dict[str, Any],
    site: str,
) -> tuple[Tensor, list[Tensor]]:
    """X of the items' rows, and the attention pattern of each stretch that attends to itself."""
    if site == "audio":
        x = torch.cat([spy.x[layer][0][item, : FRAMES[item]] for item in items])
        pairs = []
        for item in items:
            q, k = (part[item, :, : FRAMES[item]] for part in spy.heads[layer][0])
            pairs.append((q, k))
    else:
        grid = inputs[f"{modality}_grid_thw"]
        sizes = (grid.prod(1) // (4 if site == "projector" else 1)).tolist()
        x = torch.cat([spy.x[layer][call].split(sizes)[item] for item in items])
        # The attention function is called for each image and for each frame of a video.
        frames = {"image": {0: [0], 1: [1], 2: [2]}, "video": {0: [3, 4]}}[modality]
        seen = spy.heads.get(layer, [])
        pairs = [(seen[f][0][0], seen[f][1][0]) for item in items for f in frames[item] if seen]
    return x, [(q @ k.mT).softmax(-1).mean(0) for q, k in pairs]


def test_scores_are_the_definition(case: Any) -> None:
    site, model, inputs = case
    values, means = expected(model, inputs, site)
    scores = mine(ml.wrap(model), inputs, site=site)
    assert scores.site == site
    assert scores.samples == 3
    counts = dict(zip(scores.modalities, scores.occurrences, strict=True))
    assert counts == ({"audio": 2} if site == "audio" else {"image": 2, "video": 1})
    torch.testing.assert_close(scores.values, values, atol=1e-5, rtol=0)
    torch.testing.assert_close(scores.means, means, atol=1e-5, rtol=1e-5)
    if site == "projector":
        assert not scores.values[3:].any()


@pytest.mark.parametrize("site", ["vision", "audio"])
def test_sites_in_one_pass_and_inside_transformer_lens(site: str) -> None:
    model, inputs = plain(site)
    bridge = ml.wrap(model)
    tower, decoder = ml.ImportanceAnalyzer(site=site), ml.ImportanceAnalyzer()
    pairs = [(inputs, masks_of(bridge, inputs))]
    both = ml.run(bridge, pairs, tower, decoder, progress=False)
    assert torch.equal(both[0].values, mine(bridge, inputs, site=site).values)
    assert torch.equal(both[1].values, mine(bridge, inputs).values)

    inside = ml.ImportanceAnalyzer(site=site)
    rest = {name: value for name, value in inputs.items() if name != "input_ids"}
    with torch.no_grad():
        bridge.run_with_hooks(inputs["input_ids"], fwd_hooks=inside.hooks(bridge), **rest)
    assert torch.equal(inside.result().values, both[0].values)
    assert inside.result().occurrences == both[0].occurrences

    with pytest.raises(ValueError, match=f"'site': '{site}'.*'site': 'llm'"):
        decoder + tower


def test_batches_are_their_samples(case: Any) -> None:
    site, model, inputs = case
    bridge = ml.wrap(model)
    together = mine(bridge, inputs, site=site)
    merged = ml.ImportanceAnalyzer(site=site)
    for sample in range(3):
        alone = ml.ImportanceAnalyzer(site=site)
        one = only(inputs, sample, site)
        ml.run(bridge, [(one, masks_of(bridge, one))], alone, progress=False)
        merged = merged + alone
    torch.testing.assert_close(merged.result().values, together.values, atol=1e-5, rtol=0)
    assert merged.result().occurrences == together.occurrences


def only(inputs: dict[str, Any], sample: int, site: str) -> dict[str, Any]:
    """The inputs of one sample of the three."""
    row = slice(sample, sample + 1)
    if site == "audio":
        clips = {0: slice(0, 2), 1: slice(0), 2: slice(2, 3)}[sample]
        names = ("input_features", "feature_attention_mask")
        media = {name: inputs[name][clips] for name in names} if sample != 1 else {}
        return {n: inputs[n][row] for n in ("input_ids", "attention_mask")} | media
    media = {}
    sizes = inputs["image_grid_thw"].prod(1).tolist()
    patches = inputs["pixel_values"].split(sizes)
    if sample == 0:
        media = {
            "pixel_values": torch.cat(patches[:2]),
            "image_grid_thw": inputs["image_grid_thw"][:2],
        }
    if sample == 2:
        media = {"pixel_values": patches[2], "image_grid_thw": inputs["image_grid_thw"][2:]}
        media |= {name: inputs[name] for name in ("pixel_values_videos", "video_grid_thw")}
    names = ("input_ids", "attention_mask", "mm_token_type_ids")
    return {name: inputs[name][row] for name in names} | media


def edit(model: Any, site: str, change: Callable[[Any, list[int]], None]) -> Any:
    """A copy of a plain model whose down projections were edited by hand; the neurons: CHOSEN."""
    edited = copy.deepcopy(model)
    for layer, neurons in CHOSEN[site].items():
        if site == "audio":
            down = edited.model.audio_tower.layers[layer].fc2
        elif site == "vision":
            down = edited.model.visual.blocks[layer].mlp.fc2
        else:
            down = edited.model.visual.merger.mlp[2]
        with torch.no_grad():
            change(down, neurons)
    return edited


CHOSEN = {
    "audio": {0: [3, 31], 2: [0]},
    "vision": {0: [5], 1: [1, 39]},
    "projector": {0: [2, 7, 79]},
}


def chosen(site: str, model: Any = None, **options: Any) -> ml.NeuronSet:
    pairs = [(layer, n) for layer, neurons in CHOSEN[site].items() for n in neurons]
    shape = {"layers": 1, "neurons": 80} if site == "projector" else {"layers": 3, "neurons": 40}
    if model is not None:
        options["identity"] = models.identity(model, site)
    return ml.NeuronSet(pairs, **shape, site=site, **options)


def test_zero_is_zeroed_weights(case: Any) -> None:
    site, model, inputs = case
    edited = edit(model, site, lambda down, n: down.weight[:, n].zero_())
    edited = edit(model, site, lambda down, n: down.weight.index_fill_(1, torch.tensor(n), 0))
    theirs, before = logits(edited, inputs), logits(model, inputs)
    assert (theirs - before).abs().max() > 0.01
    with ml.ablate(model, chosen(site, model)):
        torch.testing.assert_close(logits(model, inputs), theirs, atol=1e-5, rtol=0)
    assert torch.equal(logits(model, inputs), before)
    bridge = ml.wrap(model)
    with ml.ablate(bridge, chosen(site, bridge)):
        torch.testing.assert_close(logits(bridge, inputs), theirs, atol=1e-5, rtol=0)
        scores = mine(bridge, inputs, site=site)
        for layer, neuron in chosen(site):
            assert not scores.means[:, layer, neuron].any()
    with bridge.hooks(fwd_hooks=ml.ablation_hooks(bridge, chosen(site))):
        torch.testing.assert_close(logits(bridge, inputs), theirs, atol=1e-5, rtol=0)
    assert torch.equal(logits(bridge, inputs), before)


@pytest.mark.parametrize("value", [0.7, "mean"])
def test_constants_move_into_the_bias(case: Any, value: Any) -> None:
    site, model, inputs = case
    probe = chosen(site)
    means = torch.rand(probe.layers, probe.neurons)
    layers = iter(CHOSEN[site])

    def change(down: Any, neurons: list[int]) -> None:
        layer, index = next(layers), torch.tensor(neurons)
        constants = torch.full((len(neurons),), 0.7) if value == 0.7 else means[layer, index]
        down.bias += down.weight[:, index] @ constants
        down.weight.index_fill_(1, index, 0)

    theirs = logits(edit(model, site, change), inputs)
    with ml.ablate(model, chosen(site, means=means), value):
        torch.testing.assert_close(logits(model, inputs), theirs, atol=1e-4, rtol=0)


def test_min_is_that_of_the_same_item(case: Any) -> None:
    site, model, inputs = case
    layer, neurons = next(iter(CHOSEN[site].items()))
    untouched = Spy(model, inputs, site).x[layer]
    with ml.ablate(model, chosen(site), "min"):
        seen = Spy(model, inputs, site).x[layer]
    for call, (before, after) in enumerate(zip(untouched, seen, strict=True)):
        if site == "audio":
            stretches = [(before[i, :n], after[i, :n]) for i, n in enumerate(FRAMES)]
        else:
            grid = inputs[("image_grid_thw", "video_grid_thw")[call]]
            sizes = (grid.prod(1) // (4 if site == "projector" else 1)).tolist()
            stretches = list(zip(before.split(sizes), after.split(sizes), strict=True))
        for old, new in stretches:
            assert (new[:, neurons] == old.min()).all()
            others = [n for n in range(old.shape[-1]) if n not in neurons]
            assert torch.equal(new[:, others], old[:, others])


def test_generation_is_that_of_the_edited_model(case: Any) -> None:
    site, model, inputs = case
    edited = edit(model, site, lambda down, n: down.weight.index_fill_(1, torch.tensor(n), 0))
    options = {"max_new_tokens": 6, "do_sample": False}
    theirs = edited.generate(**inputs, **options)
    bridge = ml.wrap(model)
    with ml.ablate(bridge, chosen(site)):
        assert torch.equal(bridge.original_model.generate(**inputs, **options), theirs)
    with ml.ablate(bridge, chosen(site), "min"):  # needs the rows of a tower that runs by itself
        bridge.original_model.generate(**inputs, **options)


def test_bake(case: Any, tmp_path: Path) -> None:
    site, model, inputs = case
    edited = edit(model, site, lambda down, n: down.weight.index_fill_(1, torch.tensor(n), 0))
    theirs = logits(edited, inputs)
    ml.bake(ml.wrap(model), chosen(site), tmp_path / "baked")
    assert AutoConfig.from_pretrained(tmp_path / "baked").architectures == [type(model).__name__]
    baked = type(model).from_pretrained(tmp_path / "baked").eval()
    assert torch.equal(logits(baked, inputs), theirs)


def test_neurons_know_their_site(case: Any, tmp_path: Path) -> None:
    site, model, inputs = case
    bridge = ml.wrap(model)
    scores = mine(bridge, inputs, site=site)
    scores.save(tmp_path / "scores.safetensors")
    loaded = ml.ImportanceScores.load(tmp_path / "scores.safetensors")
    assert loaded.site == site
    assert f"site={site!r}" in repr(loaded)
    assert set(loaded.to_frame()["site"]) == {site}
    selected = loaded.select(0.1)
    medium = "audio" if site == "audio" else "image"
    neurons = selected[medium]
    assert neurons.site == site
    assert set(neurons.to_frame()["site"]) == {site}
    assert ml.NeuronSet.random(3, like=neurons).site == (~neurons).site == site
    neurons.save(tmp_path / "neurons.safetensors")
    assert ml.NeuronSet.load(tmp_path / "neurons.safetensors") == neurons
    # Without a model's identity the site is kept as well.
    chosen(site).save(tmp_path / "bare.safetensors")
    assert ml.NeuronSet.load(tmp_path / "bare.safetensors") == chosen(site)
    with ml.ablate(bridge, selected, "mean"):
        assert logits(bridge, inputs).isfinite().all()
    decoder = ml.NeuronSet([(1, 2), (1, 3)], layers=2, neurons=48)
    figure = plots.neurons_by_layer(selected | {"of the decoder": decoder})
    assert [panel.get_xlabel() for panel in figure.axes] == [
        f"layer of the {site}",
        "layer of the llm",
    ]
    heights = [bar.get_height() for bar in figure.axes[1].patches]
    assert heights == [0, 2]


def call_an_activation_alone(bridge: Any) -> None:
    with ml.ablate(bridge, chosen("vision"), "min"):
        models.mlps(bridge, "vision")[0].activation(torch.randn(3, 40))


def errors() -> Iterator[Any]:
    llm = ml.NeuronSet([(0, 0)], layers=2, neurons=48)
    yield "'audio' is not one of its sites", lambda b, i: mine(b, i, site="audio")
    yield r"'tower' is not a site \(llm, vision", lambda b, i: mine(b, i, site="tower")
    yield "no site 'tower'", lambda b, i: ml.NeuronSet([], layers=1, neurons=1, site="tower")
    yield (
        "different sites do not mix",
        lambda b, i: llm | ml.NeuronSet([(0, 0)], layers=2, neurons=48, site="vision"),
    )
    yield (
        "chooses among the prompt's tokens",
        lambda b, i: ml.ablate(b, chosen("vision"), at="image").__enter__(),
    )
    yield (
        "cannot write 'min' in a tower",
        lambda b, i: ml.ablation_hooks(b, chosen("vision"), "min"),
    )
    yield (
        "this model's vision has 3 x 40",
        lambda b, i: ml.ablate(
            b, ml.NeuronSet([(0, 0)], layers=2, neurons=48, site="vision")
        ).__enter__(),
    )
    yield (
        "its identity is of site 'vision'",
        lambda b, i: ml.NeuronSet(
            [], layers=3, neurons=40, identity=models.identity(b, "vision"), site="llm"
        ),
    )
    yield "no neurons to draw", lambda b, i: plots.neurons_by_layer({})
    yield (
        "needs to see the vision tower called as a whole",
        lambda b, i: call_an_activation_alone(b),
    )


@pytest.mark.parametrize(("message", "action"), [pytest.param(*e, id=e[0]) for e in errors()])
def test_errors(message: str, action: Callable[[Any, Any], Any]) -> None:
    model, inputs = plain("vision")
    with pytest.raises(ValueError, match=message):
        action(ml.wrap(model), inputs)


def test_a_single_linear_projector_has_no_neurons() -> None:
    model, inputs = plain("audio")
    with pytest.raises(ValueError, match="known in llm, audio"):
        mine(ml.wrap(model), inputs, site="projector")


def test_media_that_do_not_fill_the_prompt(case: Any) -> None:
    site, model, inputs = case
    token = towers.AUDIO if site == "audio" else towers.IMAGE
    inputs["input_ids"][inputs["input_ids"] == 5] = token
    with pytest.raises(ml.SampleError, match=r"sample 0, row 0.*placeholder tokens"):
        mine(ml.wrap(model), inputs, site=site)


def test_nan_is_named_with_its_sample(case: Any) -> None:
    site, model, inputs = case
    name = "input_features" if site == "audio" else "pixel_values"
    inputs[name][-1] = torch.nan
    with pytest.raises(ml.SampleError, match=f"sample 0, row 2: NaN .* layer 0 of site '{site}'"):
        mine(ml.wrap(model), inputs, site=site)


def test_owners() -> None:
    assert sites.owners([4, 0, 3], [2, 2, 3]) == (0, 0, 2)
    assert sites.owners([], []) == sites.owners([0, 0], []) == ()
    for placeholders, sizes in (([4], [3]), ([2, 2], [4]), ([4], [4, 1]), ([4], []), ([], [1])):
        with pytest.raises(ValueError, match="placeholder tokens"):
            sites.owners(placeholders, sizes)


def test_organism(shapes: Any) -> None:
    data = ml.datasets.load("easy-vqa", limit=8, ask="both")
    one = ml.mine(shapes, data, site="vision", progress=False)
    four = ml.mine(shapes, data, site="vision", batch_size=4, progress=False)
    torch.testing.assert_close(one.values, four.values, atol=1e-5, rtol=0)
    assert dict(zip(one.modalities, one.occurrences, strict=True)) == {"image": 4, "video": 0}
    assert list(one.select(0.05)) == ["image"]

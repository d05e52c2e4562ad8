from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from PIL import Image

import miner_lens as ml
from miner_lens.models import access as models
from miner_lens.models import generation
from miner_lens.scoring import kernels
from tests import towers

Q = "what color is the shape?"


def image_of(colour: str, size: int = 64) -> dict[str, Any]:
    return {"type": "image", "image": Image.new("RGB", (size, size), colour)}


def sample(name: str, *parts: dict[str, Any]) -> ml.Sample:
    content = [*parts, {"type": "text", "text": Q}]
    return ml.Sample([{"role": "user", "content": content}], ("blue",), name)


@pytest.fixture
def samples() -> list[ml.Sample]:
    frames = [Image.new("RGB", (64, 64), c) for c in ("red", "blue", "green", "gray")]
    return [
        sample("picture", image_of("blue")),
        sample("words"),
        sample("pictures", image_of("red"), image_of("green")),
        sample("clip", {"type": "video", "video": frames}),
        sample("other", image_of("teal")),
    ]


def mine(model: Any, data: Any, **options: Any) -> ml.ImportanceScores:
    return ml.mine(model, data, progress=False, **options)


def close(a: ml.ImportanceScores, b: ml.ImportanceScores, atol: float = 1e-5) -> None:
    assert a.modalities == b.modalities
    assert a.occurrences == b.occurrences
    assert a.samples == b.samples
    torch.testing.assert_close(a.values, b.values, atol=atol, rtol=0)
    torch.testing.assert_close(a.means, b.means, atol=atol, rtol=0)


def test_against_the_definition(shapes: Any, samples: list[ml.Sample]) -> None:
    """Stage 2 written out: full softmaxes and [pos pos] x [pos neuron] products, in float64."""
    item = samples[0]
    scores = mine(shapes, [item])
    inputs = ml.inputs(shapes, item.messages)
    masks = models.layout(shapes).masks(inputs["input"])
    _, cache = shapes.run_with_cache(**inputs)
    for layer in range(6):
        x = cache[f"blocks.{layer}.mlp.act.hook_out"][0].double()
        q = cache[f"blocks.{layer}.attn.hook_rot_q"][0].double().transpose(0, 1)
        k = cache[f"blocks.{layer}.attn.hook_rot_k"][0].double().transpose(0, 1)
        k = k.repeat_interleave(len(q) // len(k), dim=0)
        p = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1).mean(0)
        for index, modality in enumerate(scores.modalities):
            s = masks[modality][0]
            if not s.any():
                assert not scores.values[:, index].any()
                continue
            xs, a = x[s], p[s][:, s]
            raw = [
                (xs > 0).double().mean(0),
                xs.mean(0),
                xs.amax(0),
                (a.softmax(0).T @ xs).sum(0),
                (a.softmax(1) @ xs).sum(0),
            ]
            for metric, value in enumerate(raw):
                scaled = (value - value.min()) / (value.max() - value.min())
                ours = scores.values[metric, index, layer].double()
                torch.testing.assert_close(ours, scaled, atol=1e-5, rtol=0)
        torch.testing.assert_close(
            scores.means[scores.modalities.index("prompt"), layer].double(),
            x.mean(0),
            atol=1e-5,
            rtol=0,
        )


@pytest.mark.parametrize("attention", ["bidirectional", "causal"])
def test_batch_size_and_padding_change_nothing(
    shapes: Any, samples: list[ml.Sample], attention: Any
) -> None:
    one = mine(shapes, samples, attention=attention)
    for batch_size in (2, 5):
        close(one, mine(shapes, samples, attention=attention, batch_size=batch_size))


def test_attention_modes_differ(shapes: Any, samples: list[ml.Sample]) -> None:
    both = [mine(shapes, samples[:1], attention=a) for a in ("bidirectional", "causal")]
    assert torch.equal(both[0].values[:3], both[1].values[:3])
    assert not torch.allclose(both[0].values[3], both[1].values[3], atol=1e-3)
    with pytest.raises(ValueError, match="attention must be"):
        mine(shapes, samples, attention="sideways")


def test_parts_merge_to_the_whole(shapes: Any, samples: list[ml.Sample]) -> None:
    whole = mine(shapes, samples)
    parts = [mine(shapes, samples[:2]), mine(shapes, samples[2:3]), mine(shapes, samples[3:])]
    close(whole, parts[0] + parts[1] + parts[2])
    analyzers = [ml.ImportanceAnalyzer() for _ in range(2)]
    ml.run(shapes, samples[:2], analyzers[0], progress=False)
    ml.run(shapes, samples[2:], analyzers[1], progress=False)
    close(whole, (analyzers[0] + analyzers[1]).result())
    close(whole, (analyzers[1] + analyzers[0]).result())


def test_state_continues(shapes: Any, samples: list[ml.Sample]) -> None:
    first = ml.ImportanceAnalyzer()
    ml.run(shapes, samples[:2], first, progress=False)
    second = ml.ImportanceAnalyzer()
    second.load_state_dict(first.state_dict())
    resumed = ml.run(shapes, samples[2:], second, progress=False)
    whole = mine(shapes, samples)
    assert torch.equal(resumed.values, whole.values)
    assert torch.equal(resumed.means, whole.means)


def test_several_analyzers_share_a_pass(shapes: Any, samples: list[ml.Sample]) -> None:
    both = ml.run(
        shapes,
        samples,
        ml.ImportanceAnalyzer(),
        ml.ImportanceAnalyzer("causal"),
        progress=False,
        batch_size=2,
    )
    assert isinstance(ml.ImportanceAnalyzer(), ml.Analyzer)
    close(both[0], mine(shapes, samples, batch_size=2))
    close(both[1], mine(shapes, samples, batch_size=2, attention="causal"))


def test_same_hooks_in_plain_transformer_lens(shapes: Any, samples: list[ml.Sample]) -> None:
    analyzer = ml.ImportanceAnalyzer()
    for item in samples[:3]:
        inputs = ml.inputs(shapes, item.messages)
        ids = inputs.pop("input")
        shapes.run_with_hooks(ids, fwd_hooks=analyzer.hooks(shapes), **inputs)
    close(analyzer.result(), mine(shapes, samples[:3]))


def test_hooks_know_padding_and_pass_decoding_by(shapes: Any, samples: list[ml.Sample]) -> None:
    analyzer = ml.ImportanceAnalyzer()
    batch = generation.prepare_inputs(shapes, [item.messages for item in samples])
    ids = batch.pop("input_ids")
    shapes.run_with_hooks(ids, fwd_hooks=analyzer.hooks(shapes), **batch)
    close(analyzer.result(), mine(shapes, samples))
    analyzer = ml.ImportanceAnalyzer()
    with shapes.hooks(fwd_hooks=analyzer.hooks(shapes)):
        ml.generate(shapes, samples[0].messages, 4, min_new_tokens=4)
    close(analyzer.result(), mine(shapes, samples[:1]))


def test_processor_set_afterwards(shapes: Any, samples: list[ml.Sample]) -> None:
    from transformers import AutoModelForImageTextToText

    bridge = ml.wrap(
        AutoModelForImageTextToText.from_pretrained(ml.organisms.path("shapes")).eval()
    )
    bridge.processor = shapes.processor
    close(mine(bridge, samples), mine(shapes, samples))


def test_copies_and_changed_settings(shapes: Any, samples: list[ml.Sample]) -> None:
    bridge = copy.deepcopy(shapes)
    close(mine(bridge, samples[:1]), mine(shapes, samples[:1]))
    bridge.original_model.set_attn_implementation("eager")
    analyzer = ml.ImportanceAnalyzer()
    inputs = ml.inputs(bridge, samples[0].messages)
    bridge.run_with_hooks(inputs.pop("input"), fwd_hooks=analyzer.hooks(bridge), **inputs)
    close(analyzer.result(), mine(shapes, samples[:1]))


def test_prepared_pairs(shapes: Any, samples: list[ml.Sample]) -> None:
    pairs = []
    for item in samples:
        inputs = ml.inputs(shapes, item.messages)
        pairs.append((inputs, models.layout(shapes).masks(inputs["input"])))
    close(mine(shapes, pairs), mine(shapes, samples))
    batch = generation.prepare_inputs(shapes, [item.messages for item in samples])
    masks = models.layout(shapes).masks(batch["input_ids"], batch["attention_mask"])
    close(mine(shapes, [(batch, masks)]), mine(shapes, samples))


def test_any_iterable_and_limit(shapes: Any, samples: list[ml.Sample]) -> None:
    def forever() -> Iterator[ml.Sample]:
        while True:
            yield from samples

    assert mine(shapes, forever(), limit=7, batch_size=2).samples == 7
    for data in (samples, iter(samples)):
        for limit in (0, -1):
            with pytest.raises(ValueError, match=f"limit is {limit}; give a number of samples"):
                mine(shapes, data, limit=limit)


def test_a_limit_counts_samples_everywhere(shapes: Any) -> None:
    both = ml.datasets.load("easy-vqa", limit=5, ask="both")
    assert len(both) == 5
    named = {"all": both, "more": both}
    for data, limit, seen in ((both, None, 5), (iter(both), 3, 3), (both, 9, 5), (named, 6, 6)):
        assert mine(shapes, data, limit=limit).samples == seen


def test_eager_bridges_are_mined_fused_and_stay_eager(samples: list[ml.Sample]) -> None:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    path = ml.organisms.path("shapes")
    model = AutoModelForImageTextToText.from_pretrained(path, attn_implementation="eager").eval()
    bridge = ml.wrap(model, AutoProcessor.from_pretrained(path))
    config = model.model.language_model.config
    before = config._attn_implementation
    seen = []
    hook = ("blocks.0.attn.hook_rot_q", lambda q, hook: seen.append(config._attn_implementation))
    with bridge.hooks(fwd_hooks=[hook]):
        scores = mine(bridge, samples[:1])
    assert seen == ["sdpa"]
    assert config._attn_implementation == before == "eager"
    close(scores, mine(ml.load("shapes", device="cpu"), samples[:1]))


def test_training_mode_comes_back(tiny: Any) -> None:
    tiny.original_model.train()
    ids = torch.arange(4)[None]
    data = [({"input_ids": ids}, {"text": torch.ones(1, 4, dtype=torch.bool)})]
    mine(tiny, data)
    assert all(module.training for module in tiny.original_model.modules())


def test_unreadable_sample_is_raised_or_skipped(shapes: Any, samples: list[ml.Sample]) -> None:
    broken = sample("broken", {"type": "image", "image": "no/such/file.png"})
    data = [*samples[:2], broken, *samples[2:]]
    with pytest.raises(ml.SampleError, match=r"broken: .*no/such/file.png"):
        mine(shapes, data)
    for batch_size in (1, 4):
        scores = mine(shapes, data, on_error="skip", batch_size=batch_size)
        close(scores, mine(shapes, samples))
        assert scores.skipped == 1


@pytest.mark.parametrize(
    "message",
    [
        {"role": "user"},
        {"role": "user", "content": [{"text": "no type"}]},
        {"role": "user", "content": [{"type": "video", "video": []}]},
        {"role": "user", "content": [{"type": "image", "url": "https://example.com/a.png"}]},
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://a/b"}}]},
    ],
)
def test_malformed_samples_are_skipped(shapes: Any, samples: list[ml.Sample], message: Any) -> None:
    data = [samples[0], ml.Sample([message], (), "odd")]
    with pytest.raises(ml.SampleError, match="odd: "):
        mine(shapes, data)
    assert mine(shapes, data, on_error="skip", batch_size=2).skipped == 1


def test_nan_activations_name_layer_and_sample(tiny: Any) -> None:
    ids = torch.tensor([[5, 6, 7], [8, 9, 5]])
    masks = {"text": torch.ones(2, 3, dtype=torch.bool)}
    layer = tiny.original_model.get_decoder().layers[1]
    for bad in (float("nan"), float("inf")):

        def poison(module: Any, args: Any, output: Any, bad: float = bad) -> Any:
            if len(output) == 2:
                output[1, 2, 4] = bad
            return output

        handle = layer.mlp.act_fn.original_component.register_forward_hook(poison)
        with pytest.raises(ml.SampleError, match=r"sample 1, row 1: NaN or infinite.*layer 1"):
            mine(
                tiny,
                [
                    ({"input_ids": ids[:1]}, {"text": masks["text"][:1]}),
                    ({"input_ids": ids}, masks),
                ],
            )
        handle.remove()


def test_skipping_nan_leaves_the_others(tiny: Any) -> None:
    data = [
        ({"input_ids": torch.tensor([[5, 6, last]])}, {"text": torch.ones(1, 3) > 0})
        for last in (7, 8, 9)
    ]
    layer = tiny.original_model.get_decoder().layers[0]

    def poison(module: Any, args: Any, output: Any) -> Any:
        seen.append(1)
        return output * float("nan") if len(seen) == 2 else output

    seen: list[int] = []
    handle = layer.mlp.act_fn.original_component.register_forward_hook(poison)
    scores = ml.run(
        tiny,
        data,
        ml.ImportanceAnalyzer(),
        ml.ImportanceAnalyzer("causal"),
        on_error="skip",
        progress=False,
    )
    handle.remove()
    assert [s.samples for s in scores] == [2, 2]
    close(scores[0], mine(tiny, [data[0], data[2]]))


def test_what_was_skipped_and_why(shapes: Any, samples: list[ml.Sample]) -> None:
    broken = [sample(f"broken {n}", {"type": "image", "image": f"no/{n}.png"}) for n in range(8)]
    analyzer = ml.ImportanceAnalyzer()
    with pytest.warns(
        UserWarning, match=r"8 of 10 samples were skipped. broken 0: .*no/0.png"
    ) as w:
        ml.run(
            shapes,
            [*samples[:2], *broken],
            analyzer,
            on_error="skip",
            progress=False,
            batch_size=3,
        )
    assert len(w) == 1
    assert analyzer.skipped == 8
    assert [reason.split(":")[0] for reason in analyzer.reasons] == [
        f"broken {n}" for n in range(5)
    ]


def test_pairs_with_more_than_inputs(tiny: Any) -> None:
    ids = torch.tensor([[5, 6, 7, 8]])
    mask = {"text": torch.ones(1, 4) > 0}
    plain = mine(tiny, [({"input_ids": ids}, mask)])
    more = {"labels": ids, "use_cache": True, "logits_to_keep": 2, "return_dict": False}
    close(mine(tiny, [({"input_ids": ids, **more}, mask)]), plain, atol=0)
    square = torch.ones(1, 1, 4, 4, dtype=torch.bool).tril()
    with pytest.raises(
        ValueError, match=r"attention_mask must be of shape \(1, 4\).*\(1, 1, 4, 4\)"
    ):
        mine(tiny, [({"input_ids": ids, "attention_mask": square}, mask)])


def test_bad_calls(shapes: Any, tiny: Any, samples: list[ml.Sample]) -> None:
    ids = torch.arange(4)[None]
    broken = sample("broken", {"type": "image", "image": b"?"})
    cases: list[tuple[Any, Any, dict[str, Any], str]] = [
        (shapes, [], {}, "no data"),
        (shapes, iter(()), {}, "no data"),
        (shapes, [broken, broken], {"on_error": "skip"}, "None of the 2 samples"),
        (shapes, samples, {"on_error": "ignore"}, "on_error must be"),
        (shapes, samples, {"batch_size": 0}, "batch_size must be"),
        (shapes, ["words"], {}, "item 0 is str"),
        (shapes.original_model, samples, {}, "ml.wrap"),
        (tiny, samples, {}, "no processor"),
        (tiny, [({"input_ids": ids}, {})], {}, "at least one modality"),
        (tiny, [({"input_ids": ids}, {"text": torch.ones(1, 4)})], {}, "boolean tensor"),
        (tiny, [({"input_ids": ids}, {"text": torch.ones(1, 3) > 0})], {}, r"shape \(1, 4\)"),
    ]
    for model, data, options, message in cases:
        with pytest.raises(ValueError, match=message):
            mine(model, data, **options)
    padded = {"input_ids": ids, "attention_mask": torch.tensor([[0, 1, 1, 1]])}
    analyzer = ml.ImportanceAnalyzer()
    with pytest.raises(ValueError, match="marks padding as well"):
        mine(tiny, [(padded, {"text": torch.ones(1, 4) > 0})])
    with pytest.raises(ValueError, match="no input_ids"):
        mine(tiny, [({}, {"text": torch.ones(1, 4) > 0})])
    with pytest.raises(ValueError, match="given twice"):
        ml.run(shapes, samples, analyzer, analyzer, progress=False)
    with pytest.raises(ValueError, match="at least one analyzer"):
        ml.run(shapes, samples, progress=False)
    with pytest.raises(ValueError, match="No sample"):
        ml.ImportanceAnalyzer().result()


def test_analyzer_refuses_another_model(shapes: Any, tiny: Any, samples: list[ml.Sample]) -> None:
    analyzer = ml.ImportanceAnalyzer()
    ml.run(shapes, samples[:1], analyzer, progress=False)
    with pytest.raises(ValueError, match="layers"):
        analyzer.hooks(tiny)
    with pytest.raises(ValueError, match="causal"):
        analyzer + ml.ImportanceAnalyzer("causal")


def test_state_does_not_grow(shapes: Any, samples: list[ml.Sample]) -> None:
    sizes = []
    analyzer = ml.ImportanceAnalyzer()
    for _ in range(2):
        ml.run(shapes, samples, analyzer, progress=False)
        sizes.append(sum(tensor.numel() for tensor in analyzer.state_dict().values()))
    assert sizes[0] == sizes[1]


def test_what_the_scores_know(shapes: Any, samples: list[ml.Sample]) -> None:
    scores = mine(shapes, samples)
    assert scores.values.shape == (len(kernels.METRICS), len(scores.modalities), 6, 384)
    counts = dict(zip(scores.modalities, scores.occurrences, strict=True))
    assert counts == {
        "text": 5,
        "special": 5,
        "special_text": 5,
        "image": 3,
        "video": 1,
        "prompt": 5,
    }
    assert scores.info["attention"] == "bidirectional"
    assert set(scores.info["versions"]) == {
        "miner-lens",
        "transformer-lens",
        "transformers",
        "torch",
    }
    assert scores.identity == models.identity(shapes)
    named = mine(shapes, ml.datasets.load("easy-vqa", limit=1, ask="text"))
    assert named.info["data"] == "easy-vqa/test/text"


def test_progress_bar_shows_the_rate(
    shapes: Any, samples: list[ml.Sample], capsys: pytest.CaptureFixture[str]
) -> None:
    ml.mine(shapes, samples)
    shown = capsys.readouterr().err
    assert "5/5" in shown
    assert "samples/s" in shown


@pytest.mark.parametrize("model", [towers.vision_model, towers.audio_model])
def test_only_one_position_is_projected_onto_the_vocabulary(model: Any) -> None:
    bridge = ml.wrap(model())
    inputs = towers.audio_inputs() if model is towers.audio_model else towers.vision_inputs()
    seen = []
    hf_model = bridge.original_model
    handle = hf_model.register_forward_hook(lambda m, a, out: seen.append(out.logits.shape))
    masks = bridge.modality_layout or models.layout(bridge)
    pair = (inputs, masks.masks(inputs["input_ids"], inputs["attention_mask"]))
    ml.mine(bridge, [pair], progress=False)
    handle.remove()
    assert seen == [(3, 1, 100)]
    with torch.no_grad():
        assert hf_model(**inputs).logits.shape == (*inputs["input_ids"].shape, 100)

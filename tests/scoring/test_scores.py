from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from miner_lens.models.identity import ModelIdentity
from miner_lens.neurons.neuron_set import NeuronSet
from miner_lens.scoring.kernels import METRICS
from miner_lens.scoring.scores import ImportanceScores
from tests.reference import load

few = settings(max_examples=25, deadline=None)
MODALITIES = ("text", "special", "image", "video", "prompt")
IDENTITY = ModelIdentity("shapes", "Qwen2VL", 2, 30)


def make(
    seed: int = 0, samples: int = 4, absent: str = "video", **options: Any
) -> ImportanceScores:
    """Scores of a data set in which every modality but one occurs in some samples."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.rand(5, 5, 2, 30, generator=generator)
    means = torch.randn(5, 2, 30, generator=generator)
    occurrences = torch.randint(1, samples + 1, (5,), generator=generator).tolist()
    where = MODALITIES.index(absent)
    values[:, where] = means[where] = occurrences[where] = 0
    options = {"occurrences": occurrences, "means": means, **options}
    return ImportanceScores(values, MODALITIES, samples=samples, **options)


def assert_same(a: ImportanceScores, b: ImportanceScores) -> None:
    torch.testing.assert_close(a.values, b.values, atol=1e-6, rtol=0)
    assert a.means is not None
    assert b.means is not None
    torch.testing.assert_close(a.means, b.means, atol=1e-6, rtol=0)
    for name in ("modalities", "metrics", "samples", "occurrences", "info", "identity"):
        assert getattr(a, name) == getattr(b, name)


specs = st.tuples(
    st.integers(0, 2**31),  # seed
    st.integers(1, 50),  # samples
    st.sampled_from(MODALITIES),  # the absent one
    st.sampled_from(["textvqa", "coco", ["a", "b"]]),  # data
)


def make_from(spec: tuple[int, int, str, Any]) -> ImportanceScores:
    return make(*spec[:3], info={"data": spec[3], "attention": "causal"})


@few
@given(specs, specs, specs)
def test_merging_is_associative_and_order_free(one: Any, two: Any, three: Any) -> None:
    a, b, c = map(make_from, (one, two, three))
    assert_same(a + b, b + a)
    assert_same((a + b) + c, a + (b + c))


def test_merging_equals_mining_all_at_once() -> None:
    samples = torch.rand(7, 5, 2, 2, 30)
    present = torch.tensor([[1, 0], [1, 1], [1, 0], [0, 1], [1, 0], [1, 1], [1, 0]])
    samples *= present[:, None, :, None, None]
    means = torch.randn(7, 2, 2, 30) * present[..., None, None]

    def over(part: slice) -> ImportanceScores:
        counts = present[part].sum(0)
        return ImportanceScores(
            samples[part].mean(0),
            ("text", "image"),
            samples=len(samples[part]),
            occurrences=counts.tolist(),
            means=means[part].sum(0) / counts.clamp(min=1)[:, None, None],
        )

    assert_same(over(slice(3)) + over(slice(3, 7)), over(slice(7)))


def test_sum() -> None:
    a, b, c = (make(seed) for seed in range(3))
    assert_same(sum([a, b, c]), a + b + c)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="unsupported operand"):
        1 + a


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"identity": ModelIdentity("big", "Llava", 2, 30)}, r"Qwen2VL \(shapes\).*Llava \(big\)"),
        ({"info": {"attention": "causal"}}, "attention modes do not mix: bidirectional and causal"),
        ({"metrics": ("a", "b", "c", "d", "e")}, "different metrics"),
    ],
)
@pytest.mark.parametrize("merge", [lambda a, b: a + b, lambda a, b: ImportanceScores.mean([a, b])])
def test_what_does_not_add_up(other: dict[str, Any], message: str, merge: Any) -> None:
    ours = make(identity=IDENTITY, info={"attention": "bidirectional"})
    with pytest.raises(ValueError, match=message):
        merge(ours, make(**other))


def test_other_shapes_and_modalities_do_not_add_up() -> None:
    a = ImportanceScores(torch.rand(5, 1, 2, 3), ["text"])
    with pytest.raises(ValueError, match="2 layers x 3 neurons and 2 x 4"):
        a + ImportanceScores(torch.rand(5, 1, 2, 4), ["text"])
    with pytest.raises(ValueError, match=r"got text and image.*ImportanceScores\.mean"):
        a + ImportanceScores(torch.rand(5, 1, 2, 3), ["image"])
    with pytest.raises(TypeError, match="unsupported operand"):
        a + 1  # type: ignore[operator]


def test_what_has_no_mean() -> None:
    for wrong in (make(), {"a": make()}, [make(), None]):
        with pytest.raises(TypeError, match=r"a list of ImportanceScores.*it has (str|NoneType)"):
            ImportanceScores.mean(wrong)  # type: ignore[arg-type]


def test_what_is_known_of_the_model_is_kept() -> None:
    named, vague = make(identity=replace(IDENTITY, fingerprint="abc")), make(identity=IDENTITY)
    for together in (vague + named, named + vague, make() + named):
        assert together.identity == named.identity
    assert ImportanceScores.mean([make(), vague, named]).identity == named.identity


def test_mean_over_data_sets() -> None:
    a, b = make(1, 10, "video"), make(2, 2, "image")
    c = ImportanceScores(torch.rand(5, 1, 2, 30), ["audio"], means=torch.rand(1, 2, 30))
    mean = ImportanceScores.mean([a, b, c])
    assert mean.modalities == (*MODALITIES, "audio")
    torch.testing.assert_close(mean["text"], (a["text"] + b["text"]) / 2)
    torch.testing.assert_close(mean["image"], a["image"])
    torch.testing.assert_close(mean["video"], b["video"])
    torch.testing.assert_close(mean["audio"], c["audio"])
    assert mean.means is not None
    assert c.means is not None
    torch.testing.assert_close(mean.means[-1], c.means[0])
    assert mean.samples == 13
    assert mean.occurrences[-1] == 1
    only = ImportanceScores.mean([make(absent="video")])
    assert_same(only, make(absent="video"))
    with pytest.raises(ValueError, match="at least one data set"):
        ImportanceScores.mean([])


def test_select() -> None:
    scores = make(samples=3, identity=IDENTITY)
    chosen = scores.select(0.2)
    assert list(chosen) == ["text", "special", "image"]  # video never occurs, M is 3
    assert [len(neurons) for neurons in chosen.values()] == [4, 4, 4]
    assert scores.means is not None
    for neurons in chosen.values():
        assert neurons.identity == IDENTITY
        assert torch.equal(neurons.means, scores.means[-1])  # type: ignore[arg-type]
    assert list(scores.select(0.2, split="special_text_as_one")) == ["image"]
    assert list(scores.select(0.2, split="prompt")) == ["prompt"]
    by_name = scores.select(0.2, weights={"mean": 0.25, "max": 0.25, "attn_k": 0.5})
    assert by_name == chosen
    assert make(means=None).select(0.2)["text"].means is None
    random = scores.select(0.2, "random", seed=1)
    assert list(random) == ["random"]
    assert len(random["random"]) == 12
    assert random == scores.select(0.2, "random", seed=1)


def test_order_of_the_split() -> None:
    scores = ImportanceScores(torch.rand(5, 3, 2, 30), ["audio", "image", "text"])
    assert list(scores.select(0.5)) == ["text", "image", "audio"]


def test_select_errors() -> None:
    scores = ImportanceScores(torch.rand(5, 1, 2, 30), ["text"])
    with pytest.raises(ValueError, match="no split 'all'; there are special_text_separate"):
        scores.select(split="all")
    with pytest.raises(ValueError, match="split prompt needs one of prompt; the data has text"):
        scores.select(split="prompt")
    with pytest.raises(ValueError, match="ratio must lie in"):
        scores.select(2.0)
    with pytest.raises(ValueError, match="smallest ratio that works"):
        scores.select(0.001)
    with pytest.raises(ValueError, match="no strategy"):
        scores.select(strategy="best")
    nothing = ImportanceScores(torch.zeros(5, 1, 2, 30), ["text"])
    with pytest.raises(ValueError, match="no modality at all"):
        nothing.select()


@few
@given(spec=specs, known=st.booleans())
def test_save_and_load(tmp_path_factory: Any, spec: Any, known: bool) -> None:
    path = tmp_path_factory.mktemp("scores") / "scores.safetensors"
    scores = make_from(spec)
    if known:
        scores = make(identity=IDENTITY, info={"versions": {"torch": "2"}, "data": None})
    scores.save(path)
    loaded = ImportanceScores.load(path)
    assert_same(loaded, scores)
    assert torch.equal(loaded.values, scores.values)


def test_load_errors(tmp_path: Path) -> None:
    path = tmp_path / "scores.safetensors"
    make().select(0.2)["image"].save(path)
    with pytest.raises(ValueError, match=r"holds NeuronSet, not ImportanceScores"):
        ImportanceScores.load(path)
    make().save(path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="not a complete safetensors file"):
        ImportanceScores.load(path)


def test_views() -> None:
    scores = make(identity=IDENTITY, samples=9)
    frame = scores.to_frame()
    assert list(frame.columns) == ["site", "metric", "modality", "layer", "neuron", "score"]
    row = frame[
        (frame.metric == "max")
        & (frame.modality == "image")
        & (frame.layer == 1)
        & (frame.neuron == 7)
    ]
    assert row.score.item() == scores.values[METRICS.index("max"), 2, 1, 7].item()
    assert torch.equal(scores["image"], scores.values[:, 2])
    with pytest.raises(KeyError, match="no 'audio' here; there are text, special"):
        scores["audio"]
    assert "image" in scores
    assert "audio" not in scores
    assert list(scores) == list(MODALITIES)
    lines = repr(scores).splitlines()
    assert lines[0].startswith("ImportanceScores(2 layers x 30 neurons of shapes, samples=9")
    assert [line.split()[0] for line in lines[2:]] == list(MODALITIES)
    with pytest.raises(AttributeError):
        scores.samples = 3  # type: ignore[misc]


def test_occurrences_are_inferred() -> None:
    values = torch.rand(5, 2, 2, 30)
    values[:, 1] = 0
    assert ImportanceScores(values, ["text", "image"], samples=6).occurrences == (6, 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"modalities": ["text"]}, r"expected \[metric modality layer neuron\].*1 modalities"),
        ({"modalities": ["text", "text"]}, "named twice"),
        ({"metrics": ["prob"]}, "with 1 metrics"),
        ({"samples": 0}, "at least 1, got 0"),
        ({"occurrences": [1]}, "one count from 0 to 1"),
        ({"occurrences": [1, 2]}, "one count from 0 to 1"),
        ({"identity": IDENTITY}, "shapes has 2 x 30"),
    ],
)
def test_bad_input(options: dict[str, Any], message: str) -> None:
    options = {"modalities": ["text", "image"], **options}
    with pytest.raises(ValueError, match=message):
        ImportanceScores(torch.rand(5, 2, 3, 4), options.pop("modalities"), **options)


def test_modality_that_was_not_selected() -> None:
    scores = ImportanceScores(torch.rand(5, 2, 2, 50), ["text", "image"])
    chosen = scores.select(0.1)
    assert list(chosen) == ["text", "image"]
    with pytest.raises(
        KeyError, match="No neurons were selected for 'audio', only for text, image"
    ):
        chosen["audio"]
    with pytest.raises(KeyError, match="There is no 'audio' here"):
        scores["audio"]


def test_skipped_samples_add_up(tmp_path: Path) -> None:
    parts = [
        ImportanceScores(torch.rand(5, 1, 1, 9), ["text"], samples=4, skipped=n) for n in (1, 2)
    ]
    assert (parts[0] + parts[1]).skipped == 3
    assert ImportanceScores.mean(parts).skipped == 3
    parts[1].save(tmp_path / "scores.safetensors")
    assert ImportanceScores.load(tmp_path / "scores.safetensors").skipped == 2
    assert "2 skipped" in repr(parts[1])


@pytest.mark.parametrize("number", range(4))
def test_reference_selections_through_the_public_api(number: int) -> None:
    """No split is named: the scores' own modalities say which one it is."""
    expected = load(f"select_{number}.npz")
    modalities = [str(name) for name in expected["modalities"]]
    scores = ImportanceScores(torch.tensor(expected["ism"]), modalities)
    for index, case in enumerate(json.loads(str(expected["cases"]))):
        chosen = scores.select(case["ratio"], case["strategy"], weights=case["weights"])
        assert list(chosen) == modalities
        for modality, neurons in chosen.items():
            wanted = {tuple(row) for row in expected[f"case{index}_{modality}"].tolist()}
            assert set(neurons) == wanted


def test_means_of_data_sets_do_not_add_up(tmp_path: Path) -> None:
    one, other = make(seed=1), make(seed=2)
    mean = ImportanceScores.mean([one, other])
    assert (mean.data_sets, (one + other).data_sets) == (2, 1)
    assert "data_sets=2" in repr(mean)
    mean.save(tmp_path / "mean.safetensors")
    for averaged in (mean, ImportanceScores.load(tmp_path / "mean.safetensors")):
        for a, b in ((averaged, one), (one, averaged), (averaged, averaged)):
            with pytest.raises(
                ValueError, match=r"mean of 2 data sets.*no samples to weigh.*first"
            ):
                a + b
    alone = ImportanceScores.mean([one])
    assert (alone + other).samples == one.samples + other.samples
    assert ImportanceScores.mean([mean]).data_sets == 2
    third = make(seed=3)
    assert ImportanceScores.mean([one, other, third]).data_sets == 3
    for nested in ([mean, third], [third, mean]):
        with pytest.raises(ValueError, match=r"mean of 2 data sets already.*all data sets at once"):
            ImportanceScores.mean(nested)


def test_files_of_the_first_version() -> None:
    """Written before results shared their way of saving."""
    folder = Path(__file__).parents[1] / "files"
    means = torch.arange(8.0).view(2, 4) / 8
    who = ModelIdentity(
        "owner/model", "Qwen2VLForConditionalGeneration", 2, 4, "vision", "0123456789abcdef"
    )
    neurons = NeuronSet.load(folder / "neurons.safetensors")
    assert neurons == NeuronSet([(0, 3), (1, 2)], layers=2, neurons=4, identity=who)
    assert neurons.identity is not None
    assert neurons.identity.name == "owner/model"
    assert torch.equal(neurons.means, means)
    scores = ImportanceScores.load(folder / "scores.safetensors")
    assert torch.equal(scores.values, torch.arange(80.0).view(5, 2, 2, 4) / 80)
    assert torch.equal(scores.means, torch.stack([means, -means]))
    assert (scores.modalities, scores.identity) == (("image", "video"), who)
    assert (scores.samples, scores.occurrences, scores.skipped) == (7, (7, 3), 1)
    assert scores.info == {"attention": "causal", "data": "some"}
    assert scores.data_sets == 1

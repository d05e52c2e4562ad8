from __future__ import annotations

import copy
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from miner_lens import files
from miner_lens.models.access import identity
from miner_lens.models.identity import ModelIdentity
from miner_lens.neurons.ablation import ablate
from miner_lens.neurons.neuron_set import NeuronSet
from tests.towers import vision_model

few = settings(max_examples=30, deadline=None)
LAYERS, NEURONS = 3, 5
IDENTITY = ModelIdentity("shapes", "Qwen2VL", LAYERS, NEURONS, fingerprint="abc")
sets = st.builds(
    lambda pairs: make(*pairs),
    st.sets(st.tuples(st.integers(0, LAYERS - 1), st.integers(0, NEURONS - 1))),
)


def make(*pairs: tuple[int, int], **options: Any) -> NeuronSet:
    return NeuronSet(pairs, layers=LAYERS, neurons=NEURONS, **options)


@few
@given(sets, sets, sets)
def test_algebra(a: NeuronSet, b: NeuronSet, c: NeuronSet) -> None:
    assert ~~a == a
    assert ~(a | b) == ~a & ~b
    assert ~(a & b) == ~a | ~b
    assert a | (a & b) == a == a & (a | b)
    assert a | b == b | a
    assert a & b == b & a
    assert (a | b) | c == a | (b | c)
    assert (a & b) & c == a & (b & c)
    assert (a ^ b) ^ c == a ^ (b ^ c)
    assert a & (b | c) == (a & b) | (a & c)
    assert a - b == a & ~b
    assert a ^ b == (a - b) | (b - a)
    assert len(a | b) == len(a) + len(b) - len(a & b)
    assert (a <= b) == (a | b == b) == (b >= a)
    assert a.isdisjoint(b) == (len(a & b) == 0)
    assert a | ~a == ~make()
    assert not a & ~a


@few
@given(sets, sets)
def test_agrees_with_python_sets(a: NeuronSet, b: NeuronSet) -> None:
    assert list(a) == sorted(set(a))
    assert all(type(i) is int for pair in a for i in pair)
    assert set(a | b) == set(a) | set(b)
    assert set(a - b) == set(a) - set(b)
    assert (a == b) == (set(a) == set(b))
    assert len({a, b, make(*a)}) == len({frozenset(a), frozenset(b)})
    assert bool(a) == bool(set(a))
    assert all(pair in a for pair in a)


@few
@given(sets, st.integers(0, 99))
def test_layer_matched_control(chosen: NeuronSet, seed: int) -> None:
    control = NeuronSet.random_like(chosen, seed)
    assert control.counts() == chosen.counts()
    assert control == NeuronSet.random_like(make(*chosen), seed)
    assert len(control | ~control) == LAYERS * NEURONS


def test_layer_matched_controls_are_drawn_from_the_whole_layer() -> None:
    chosen = make((0, 1), (2, 3), (2, 4), identity=IDENTITY, means=torch.ones(LAYERS, NEURONS))
    drawn = [NeuronSet.random_like(chosen, seed) for seed in range(60)]
    together = NeuronSet.union(drawn)
    assert together.counts() == [NEURONS, 0, NEURONS]
    assert len(set(drawn)) > 30
    assert any(not one.isdisjoint(chosen) for one in drawn)
    assert (drawn[0].identity, drawn[0].site) == (IDENTITY, "llm")
    assert torch.equal(drawn[0].means, chosen.means)  # type: ignore[arg-type]


def test_inputs() -> None:
    expected = make((0, 1), (2, 4))
    assert make((2, 4), (0, 1), (0, 1)) == expected
    for pairs in ([[2, 4], [0, 1]], iter([(0, 1), (2, 4)]), {(0, 1), (2, 4)}):
        assert NeuronSet(pairs, layers=3, neurons=5) == expected
    array = np.array([[0, 1], [2, 4]])
    assert NeuronSet(array, layers=3, neurons=5) == expected
    assert NeuronSet(torch.tensor(array, dtype=torch.int32), layers=3, neurons=5) == expected
    assert NeuronSet.from_mask(expected.mask) == expected
    frame = expected.to_frame()[["layer", "neuron"]]
    for table in (frame, frame[["neuron", "layer"]]):
        assert NeuronSet(table, layers=3, neurons=5) == expected
    with pytest.raises(ValueError, match="layer and neuron, of one site, not site, layer, neuron"):
        NeuronSet(expected.to_frame(), layers=3, neurons=5)
    assert NeuronSet(frame[frame["layer"] > 4], layers=3, neurons=5) == make()
    assert NeuronSet(expected, layers=3, neurons=5) == expected
    assert len(make()) == 0
    for absent in [(0, 0), (0, 9), (-1, 4), "text", 3, (0, 1, 2)]:
        assert absent not in expected


@pytest.mark.parametrize("pair", [(3, 0), (0, 5), (-1, 0), (0, -1)])
def test_neuron_outside_the_model(pair: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="lies outside 3 layers x 5 neurons"):
        make((0, 0), pair)


@pytest.mark.parametrize(
    "pairs",
    [
        [1, 2, 3],
        [(1, 2, 3)],
        [(0.5, 1.0)],
        [(1, 2), (3,)],
        ["ab"],
        3,
        np.ones((3, 2), dtype=bool),
        torch.ones(1, 2, dtype=torch.complex64),
    ],
)
def test_not_pairs(pairs: Any) -> None:
    with pytest.raises(ValueError, match=r"must be pairs \(layer, neuron\)"):
        NeuronSet(pairs, layers=3, neurons=5)


@pytest.mark.parametrize("mask", [torch.rand(3, 5), np.ones((3, 5)), torch.ones(15) > 0])
def test_not_a_mask(mask: Any) -> None:
    with pytest.raises(ValueError, match=r"must be booleans \[layer neuron\], not torch"):
        NeuronSet.from_mask(mask)


def test_masks_of_numpy() -> None:
    neurons = make((0, 1), (2, 4))
    assert NeuronSet.from_mask(neurons.mask.numpy()) == neurons  # type: ignore[arg-type]


def test_what_is_known_of_the_model_is_kept() -> None:
    """Where weights could not be read, nobody knows which they are; that must not spread."""
    vague = make((0, 1), identity=replace(IDENTITY, fingerprint=None))
    ours = make((0, 2), identity=IDENTITY)
    other = make((0, 3), identity=replace(IDENTITY, fingerprint="xyz"))
    assert (vague | ours).identity == (ours | vague).identity == IDENTITY
    assert vague | ours == ours | vague
    with pytest.raises(ValueError, match="weights abc"):
        vague | ours | other


def test_of_a_model() -> None:
    model = vision_model()
    neurons = NeuronSet.of([(1, 40), (0, 3), (0, 3)], model)
    assert list(neurons) == [(0, 3), (1, 40)]
    assert neurons.identity == identity(model)
    tower = NeuronSet.of(np.array([[2, 39]]), model, site="vision")
    assert (tower.site, tower.layers, tower.neurons) == ("vision", 3, 40)
    with ablate(model, neurons), ablate(model, tower):
        pass
    with pytest.raises(ValueError, match=r"\(2, 0\) \(layer, neuron\) lies outside 2 layers x 48"):
        NeuronSet.of([(0, 3), (2, 0)], model)
    with pytest.raises(ValueError, match="not one of its sites"):
        NeuronSet.of([(0, 3)], model, site="audio")


def test_means_and_identity_must_fit() -> None:
    with pytest.raises(ValueError, match="one mean for each of 3 layers x 5 neurons"):
        make(means=torch.zeros(3, 4))
    with pytest.raises(ValueError, match="its identity shapes has 3 x 5"):
        NeuronSet([], layers=3, neurons=4, identity=IDENTITY)


def test_immutable() -> None:
    neurons = make((0, 1), means=torch.ones(3, 5))
    with pytest.raises(AttributeError):
        neurons.layers = 4  # type: ignore[misc]
    assert neurons.means is not None
    neurons.mask[:] = True
    neurons.means[:] = 0
    neurons.by_layer()[0][:] = 3
    assert list(neurons) == [(0, 1)]
    assert neurons.means.min() == 1


def test_views() -> None:
    neurons = make((2, 4), (0, 1), (2, 0), identity=IDENTITY)
    assert neurons.counts() == [1, 0, 2]
    assert {layer: index.tolist() for layer, index in neurons.by_layer().items()} == {
        0: [1],
        2: [0, 4],
    }
    frame = neurons.to_frame()
    assert list(frame.columns) == ["site", "layer", "neuron"]
    pairs = frame[["layer", "neuron"]].to_numpy().tolist()
    assert [tuple(pair) for pair in pairs] == list(neurons)
    assert set(frame["site"]) == {"llm"}
    assert repr(neurons) == "NeuronSet(3 of 15 neurons, 3 layers, model='shapes')"
    assert neurons.site == make().site == "llm"
    assert copy.deepcopy(neurons) == neurons == pickle.loads(pickle.dumps(neurons))


def test_means_follow_the_algebra() -> None:
    with_means = make((0, 1), means=torch.rand(3, 5))
    for result in (with_means | make(), make() | with_means, ~with_means):
        assert torch.equal(result.means, with_means.means)  # type: ignore[arg-type]
    assert with_means == make((0, 1))
    assert hash(with_means) == hash(make((0, 1)))


@few
@given(sets, sets, sets, st.lists(st.sampled_from([None, 0.0, 1.0]), min_size=3, max_size=3))
def test_means_that_differ_are_in_doubt_in_any_order(
    a: NeuronSet, b: NeuronSet, c: NeuronSet, values: list[float | None]
) -> None:
    """A set is combined with sets of other data: no data's means may win by their place."""
    steps = torch.arange(15.0).view(3, 5)
    a, b, c = (
        make(*one, means=None if value is None else value * steps)
        for one, value in zip((a, b, c), values, strict=True)
    )
    known = {value for value in values if value is not None}
    for combined in ((a | b) | c, c | (b | a), a ^ (b ^ c), (b & c) & a, (a - b) - c):
        if not known:
            assert combined.means is None
            continue
        expected = max(known) * steps
        if len(known) > 1:
            expected[steps > 0] = torch.nan  # but neuron (0, 0) has the mean 0 in all
        torch.testing.assert_close(combined.means, expected, equal_nan=True, rtol=0, atol=0)


def test_means_in_doubt_are_not_written() -> None:
    model = vision_model()
    means = torch.rand(2, 48)
    one = NeuronSet([(0, 3)], layers=2, neurons=48, means=means)
    other = NeuronSet(
        [(1, 4)], layers=2, neurons=48, means=means.clone().index_fill_(1, torch.tensor(4), 2)
    )
    with pytest.raises(ValueError, match=r"not one value for 1 of 2 neurons.*one ablation inside"):
        ablate(model, one | other, "mean").__enter__()
    for fine in (one | one, one | NeuronSet([(1, 5)], layers=2, neurons=48), (one | other) & one):
        with ablate(model, fine, "mean"):
            pass
    with ablate(model, one | other):
        pass


def test_sets_of_different_models_do_not_mix() -> None:
    ours = make((0, 1), identity=IDENTITY)
    other = ModelIdentity("big", "Qwen2VL", 3, 6)
    with pytest.raises(ValueError, match=r"on 3 layers x 5 neurons \(shapes\).*3 x 6 \(big\)"):
        ours | NeuronSet([], layers=3, neurons=6, identity=other)
    with pytest.raises(ValueError, match="do not mix: 3 layers x 5 neurons and 3 x 6"):
        ours & NeuronSet([], layers=3, neurons=6)
    with pytest.raises(TypeError, match="not with set"):
        ours | {(0, 1)}  # type: ignore[operator]
    assert (make() | ours).identity == IDENTITY


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": 4}, "3 layers x 5 neurons .* has 4 x 5"),
        ({"site": "vision"}, "site 'llm' .* site 'vision'"),
        ({"architecture": "Llava"}, "Qwen2VL .* Llava"),
        ({"fingerprint": "xyz"}, "weights abc .* weights xyz.*transfer"),
    ],
)
def test_identity_refuses_another_model(change: dict[str, Any], message: str) -> None:
    other = ModelIdentity(**{**IDENTITY.to_dict(), "name": "other", **change})
    with pytest.raises(ValueError, match=message) as caught:
        IDENTITY.check(other, "NeuronSet")
    assert str(caught.value).startswith("NeuronSet was mined on")
    assert "(shapes)" in str(caught.value)
    assert "(other)" in str(caught.value)


def test_identity_accepts_the_same_model() -> None:
    values = IDENTITY.to_dict()
    assert ModelIdentity.from_dict({**values, "added_later": 1}) == IDENTITY
    IDENTITY.check(ModelIdentity.from_dict({**values, "name": "./copy"}))
    IDENTITY.check(ModelIdentity.from_dict({**values, "fingerprint": None}))


def test_transfer() -> None:
    other = ModelIdentity("tuned", "Qwen2VL", 3, 5, fingerprint="xyz")
    ours = make((0, 1), identity=IDENTITY, means=torch.ones(3, 5))
    moved = ours.transfer(other)
    assert list(moved) == list(ours)
    assert moved.identity == other
    assert moved.means is None
    model = vision_model()
    tower = NeuronSet([(1, 39)], layers=3, neurons=40, site="vision").transfer(model)
    assert tower.identity == identity(model, "vision")
    with pytest.raises(ValueError, match="not one of its sites"):
        NeuronSet([(1, 39)], layers=3, neurons=40, site="audio").transfer(model)
    with pytest.raises(ValueError, match="4 x 5"):
        ours.transfer(ModelIdentity("tall", "Qwen2VL", 4, 5))
    for tower in (make((0, 1), site="vision"), make(identity=replace(IDENTITY, site="vision"))):
        with pytest.raises(ValueError, match=r"site 'vision'.*site 'llm'"):
            tower.transfer(other)
        assert tower.transfer(replace(other, site="vision")).site == "vision"


@few
@given(sets, st.booleans())
def test_save_and_load(tmp_path_factory: Any, neurons: NeuronSet, known: bool) -> None:
    path = tmp_path_factory.mktemp("sets") / "new" / "image.safetensors"
    if known:
        neurons = make(*neurons, identity=IDENTITY, means=torch.rand(3, 5))
    neurons.save(path)
    loaded = NeuronSet.load(path)
    assert loaded == neurons
    assert loaded.identity == neurons.identity
    if known:
        assert torch.equal(loaded.means, neurons.means)  # type: ignore[arg-type]
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_damaged_files(tmp_path: Path) -> None:
    path = tmp_path / "image.safetensors"
    make((0, 1), (2, 2)).save(path)
    whole = path.read_bytes()
    for damaged in (b"", b"no such thing", whole[:20], whole[:-3], b"\x80\x04K\x01."):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"not a complete safetensors file"):
            NeuronSet.load(path)
    path.write_bytes(whole[:-8] + bytes([1]) + whole[-7:])
    with pytest.raises(ValueError, match="damaged: its checksum"):
        NeuronSet.load(path)
    with pytest.raises(FileNotFoundError, match="no file"):
        NeuronSet.load(tmp_path / "absent.safetensors")


def test_foreign_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from safetensors.torch import save_file

    path = tmp_path / "image.safetensors"
    save_file({"weight": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match="miner-lens did not write it"):
        NeuronSet.load(path)
    files.write(path, "ImportanceScores", {}, {})
    with pytest.raises(ValueError, match="holds ImportanceScores, not NeuronSet"):
        NeuronSet.load(path)
    with monkeypatch.context() as patch:
        patch.setattr(files, "FORMAT", files.FORMAT + 1)
        make().save(path)
    with pytest.raises(ValueError, match="Upgrade"):
        NeuronSet.load(path)
    with pytest.raises(TypeError, match=r"metadata of image\.safetensors must be JSON"):
        files.write(path, "NeuronSet", {}, {"identity": object()})


def test_a_failed_save_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "image.safetensors"
    make((0, 1)).save(path)

    def fail(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", fail)
        with pytest.raises(KeyboardInterrupt):
            make((1, 1)).save(path)
    assert list(NeuronSet.load(path)) == [(0, 1)]
    assert list(tmp_path.iterdir()) == [path]


def test_random_and_union() -> None:
    like = NeuronSet([(0, 1)], layers=3, neurons=20)
    drawn = [NeuronSet.random(7, like=like, seed=seed) for seed in (0, 0, 1)]
    assert [len(one) for one in drawn] == [7, 7, 7]
    assert drawn[0] == drawn[1] != drawn[2]
    assert NeuronSet.union(drawn) == drawn[0] | drawn[2]
    with pytest.raises(ValueError, match="Cannot draw 61 of the model's 60 neurons"):
        NeuronSet.random(61, like=like)
    assert NeuronSet.union({"a": drawn[0], "b": drawn[2]}) == drawn[0] | drawn[2]
    with pytest.raises(ValueError, match="at least one set"):
        NeuronSet.union([])
    for wrong in (drawn[0], ["a"], [drawn[0], None]):
        with pytest.raises(TypeError, match=r"a list of NeuronSets.*has (tuple|str|NoneType)"):
            NeuronSet.union(wrong)  # type: ignore[arg-type]


def test_numpy_pairs_names_and_shared_memory() -> None:
    means = torch.zeros(2, 4)
    chosen = NeuronSet([(0, 3)], layers=2, neurons=4, means=means)
    means.fill_(9)
    assert chosen.means is not None
    assert not chosen.means.any()
    for pair in chosen.to_frame()[["layer", "neuron"]].to_numpy():
        assert tuple(pair) in chosen
    assert (0.0, 3) not in chosen
    here, there = (ModelIdentity(name, "A", 2, 4, fingerprint="f") for name in ("a", "org/a"))
    one, other = (NeuronSet([(0, 3)], layers=2, neurons=4, identity=i) for i in (here, there))
    assert one == other
    assert len({one, other}) == 1

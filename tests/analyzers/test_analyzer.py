"""`ml.Analyzer`: what follows from three methods, and what is said where they are wrong."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import miner_lens as ml
from miner_lens import files
from miner_lens.analyzers.attention_sums import AttentionSums
from miner_lens.models import access, generation
from miner_lens.scoring import kernels
from tests import towers
from tests.analyzers.own import LastToken, Sparsity, data, killed_and_shared
from tests.running.test_distributed import in_a_new_process

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def samples() -> list[ml.Sample]:
    return data(16)


def run(model: Any, samples: Any, *analyzers: Any, **options: Any) -> Any:
    return ml.run(model, samples, *analyzers, **({"progress": False, "batch_size": 4} | options))


def close(one: Any, two: Any, atol: float = 1e-6) -> None:
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(one[name], two[name], atol=atol, rtol=1e-6, check_dtype=False)


def read_by_hand(model: Any, samples: Iterable[ml.Sample], site: str = "llm") -> list[list[Tensor]]:
    """X by layer and sample, with hooks of torch's on the modules of Hugging Face's."""
    mlps = access.mlps(model, site)
    seen: list[list[Tensor]] = [[] for _ in mlps]
    handles = [
        mlp.activation.register_forward_hook(
            lambda module, args, x, rows=rows: rows.append(x.flatten(0, -2).clone())
        )
        for mlp, rows in zip(mlps, seen, strict=True)
    ]
    for sample in samples:
        inputs = ml.inputs(model, sample.messages)
        inputs["input_ids"] = inputs.pop("input")
        with torch.no_grad():
            model.original_model(**inputs)
    for handle in handles:
        handle.remove()
    return seen


def sparsity_by_hand(model: Any, samples: list[ml.Sample], site: str = "llm") -> dict[str, Tensor]:
    known = access.layout(model)
    masks = [known.masks(ml.inputs(model, sample.messages)["input"]) for sample in samples]
    found: dict[str, list[Tensor]] = {}
    for rows in read_by_hand(model, samples, site):
        if site != "llm":  # which sees nothing of a sample without an image
            masks = [{"image": torch.ones(1, len(x), dtype=torch.bool)} for x in rows]
        for name in masks[0]:
            pairs = zip(masks, rows, strict=True)
            positive = torch.cat([(x[mask[name][0]] > 0).double() for mask, x in pairs])
            if len(positive):
                found.setdefault(name, []).append(positive.mean())
    return {name: torch.stack(by_layer) for name, by_layer in found.items()}


# What follows without a word from the author.


@pytest.mark.parametrize("site", ["llm", "vision"])
def test_batch_sizes_and_plain_hooks(shapes: Any, samples: list[ml.Sample], site: str) -> None:
    one = run(shapes, samples, Sparsity(site=site), batch_size=1)
    expected = sparsity_by_hand(shapes, samples, site)
    assert set(one) == set(expected)
    for name, shares in expected.items():
        torch.testing.assert_close(one[name], shares, atol=1e-6, rtol=0)
        assert 0.05 < float(shares.min()) < float(shares.max()) < 0.95
    for batch_size in (7, "auto"):
        close(run(shapes, samples, Sparsity(site), batch_size=batch_size), one)


@pytest.mark.parametrize("site", ["llm", "vision"])
def test_run_with_hooks(shapes: Any, samples: list[ml.Sample], site: str) -> None:
    analyzer = Sparsity(site)
    for sample in samples[:3]:
        inputs = ml.inputs(shapes, sample.messages)
        tokens = inputs.pop("input")
        shapes.run_with_hooks(tokens, fwd_hooks=analyzer.hooks(shapes), **inputs)
    assert analyzer.samples == 3
    close(analyzer.result(), sparsity_by_hand(shapes, samples[:3], site))


def test_halves_make_the_whole(shapes: Any, samples: list[ml.Sample]) -> None:
    whole, halves = (Sparsity(), LastToken()), []
    run(shapes, samples, *whole)
    for part in (samples[:9], samples[9:]):
        halves.append((Sparsity(), LastToken()))
        run(shapes, part, *halves[-1], batch_size=2)
    before = halves[0][0].state_dict()
    for one, two, all_ in zip(*halves, whole, strict=True):
        for merged in (one + two, two + one):
            assert merged.samples == all_.samples == 16
            assert merged.occurrences == all_.occurrences
            if isinstance(merged, Sparsity):
                close(merged.result(), all_.result())
    assert all(torch.equal(t, before[name]) for name, t in halves[0][0].state_dict().items())


def test_sum(shapes: Any, samples: list[ml.Sample]) -> None:
    parts = [Sparsity(), Sparsity(), Sparsity()]
    for number, part in enumerate(parts):
        run(shapes, samples[5 * number : 5 * number + 5], part)
    whole = Sparsity()
    close(sum(parts).result(), run(shapes, samples[:15], whole))  # type: ignore[attr-defined]
    alone = sum(parts[:1])
    run(shapes, samples[:1], alone)
    assert (parts[0].samples, alone.samples) == (5, 6)  # type: ignore[attr-defined]
    with pytest.raises(TypeError, match="unsupported operand"):
        1 + whole


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What runs of several processes have left."""
    folder = tmp_path_factory.mktemp("processes")
    in_a_new_process(killed_and_shared, folder)
    return folder


def test_a_killed_run_continues(shapes: Any, samples: list[ml.Sample], processes: Path) -> None:
    (sparsity, last), passes = torch.load(processes / "killed/results-0.pt", weights_only=False)
    assert passes == 4  # of six, as two were done
    alone = run(shapes, samples, Sparsity(), LastToken(), batch_size=3)
    for name, shares in alone[0].items():
        assert torch.equal(sparsity[name], shares)
    close(last, alone[1], atol=0)


def test_two_ranks_are_one(shapes: Any, samples: list[ml.Sample], processes: Path) -> None:
    alone = run(shapes, samples, Sparsity(), LastToken(), batch_size=3)
    for rank in range(2):
        path = processes / f"shared/results-{rank}.pt"
        (sparsity, last), passes = torch.load(path, weights_only=False)
        assert passes < 6
        close(sparsity, alone[0])
        close(last, alone[1], atol=1e-4)


# State.


def test_each_kind_against_its_definition(shapes: Any, samples: list[ml.Sample]) -> None:
    x = read_by_hand(shapes, samples)
    last = torch.stack([torch.stack([rows[-1] for rows in layer]) for layer in x])
    analyzers = {size: LastToken() for size in (1, 7, "auto")}
    for size, analyzer in analyzers.items():
        found = run(shapes, samples, analyzer, batch_size=size)
        near = {"atol": 1e-4, "rtol": 1e-4}
        for layer in (0, 2):
            of_layer = last[layer]
            assert found["sum"].dtype == torch.float64
            torch.testing.assert_close(found["sum"][layer].float(), of_layer.sum(0), **near)
            torch.testing.assert_close(found["max"][layer], of_layer.amax(0), **near)
            torch.testing.assert_close(found["min"][layer], of_layer.amin(0), **near)
            top = of_layer.topk(3, 0).values
            torch.testing.assert_close(found["values"][layer], top, **near)
            of_ids = of_layer.gather(0, found["ids"][layer].squeeze(-1))
            torch.testing.assert_close(of_ids, top, **near)
        # Layer 1 was not asked about.
        assert len(found["sum"]) == len(found["ids"]) == 3
        assert not found["sum"][1].any()
        assert (found["max"][1] == -torch.inf).all()
        assert (found["min"][1] == torch.inf).all()
        assert (found["values"][1] == -torch.inf).all()
        assert (found["ids"][1] == -1).all()
        kept = [int((last[2] - row).abs().amax(1).argmin()) for row in found["keep"]]
        assert len(set(kept)) == 5
        torch.testing.assert_close(last[2][kept], found["keep"], **near)
        close(found, analyzers[1].result(), atol=1e-4)


class Places(ml.Analyzer[Tensor]):
    """Every token's place and its id."""

    def points(self, model: Any) -> list[ml.Point]:
        return ml.activation_points(model)[:1]

    def see(self, x: Tensor, point: ml.Point, batch: ml.Batch) -> None:
        tokens = batch.inputs["input_ids"][batch.real][:, None]
        places = batch.places[batch.real]
        self.keep("tokens", torch.cat([places, tokens], -1), at_most=10_000, ids=places)

    def result(self) -> Tensor:
        found: Tensor = self["tokens"]
        return found


def test_places_are_those_of_tokens_without_padding(shapes: Any, samples: list[ml.Sample]) -> None:
    prompts = [ml.inputs(shapes, sample.messages)["input"][0] for sample in samples]
    expected = {
        (index, place, token)
        for index, prompt in enumerate(prompts)
        for place, token in enumerate(prompt.tolist())
    }
    for batch_size in (1, 7, "auto"):
        found = run(shapes, samples, Places(), batch_size=batch_size).tolist()
        assert len(found) == len(expected)
        assert set(map(tuple, found)) == expected


class Labelled(ml.Analyzer[dict[str, Tensor]]):
    def points(self, model: Any) -> list[ml.Point]:
        return ml.activation_points(model)[:1]

    def see(self, x: Tensor, point: ml.Point, batch: ml.Batch) -> None:
        for row, label in enumerate(batch.labels):
            self.sum(str(label), x[row][batch.real[row]].sum(0))

    def result(self) -> dict[str, Tensor]:
        return {label: self[label] for label in self.labels}


def test_labels(shapes: Any, samples: list[ml.Sample]) -> None:
    x = read_by_hand(shapes, samples[:7])[0]
    expected = {"few": sum(x[i].sum(0) for i in range(2)), "more": sum(y.sum(0) for y in x[2:])}
    by_name = run(shapes, {"more": samples[2:7], "few": iter(samples[:2])}, Labelled())
    assert list(by_name) == ["few", "more"]
    close(by_name, expected, atol=1e-2)
    given = [replace(s, label="few" if i < 2 else "more") for i, s in enumerate(samples[:7])]
    analyzer = Labelled()
    close(run(shapes, given, analyzer, batch_size=3), expected, atol=1e-2)
    assert analyzer.labels == ("few", "more")
    assert (analyzer + Labelled()).labels == ("few", "more")
    run(shapes, samples[:1], unlabelled := Labelled())
    assert unlabelled.labels == ()
    assert "None" in unlabelled


def test_state_goes_through_files(shapes: Any, samples: list[ml.Sample], tmp_path: Path) -> None:
    for analyzer, result in ((Sparsity(), Sparsity.result), (LastToken(), LastToken.result)):
        run(shapes, samples[:5], analyzer)
        for reason in ("first: no such file", "second/third: NaN"):
            analyzer.skip(reason)
        files.write(tmp_path / "state", "test", analyzer.state_dict(), {})
        again = type(analyzer)()
        again.load_state_dict(files.read(tmp_path / "state", "test")[0])
        assert (again.samples, again.skipped, again.occurrences) == (5, 2, analyzer.occurrences)
        assert list(again.occurrences) == list(analyzer.occurrences)
        assert again.reasons == ("first: no such file", "second/third: NaN")
        for name, tensor in result(analyzer).items():
            assert torch.equal(result(again)[name], tensor)
        run(shapes, samples[5:], again)
        run(shapes, samples[5:], analyzer)
        for name, tensor in result(analyzer).items():
            assert torch.equal(result(again)[name], tensor)


class Careless(Sparsity):
    """Has an `__init__` that calls no other."""

    def __init__(self, threshold: float) -> None:
        self.threshold = threshold


def test_an_init_of_ones_own(shapes: Any, samples: list[ml.Sample]) -> None:
    analyzer = Careless(0.5)
    assert analyzer.settings == {"site": "llm", "threshold": 0.5}
    close(run(shapes, samples[:2], analyzer), run(shapes, samples[:2], Sparsity()))


# Refused passes.


def pairs(rows: int = 2) -> list[tuple[dict[str, Tensor], dict[str, Tensor]]]:
    ids = [torch.tensor([[5, 6, last]] * rows) for last in (7, 8, 9)]
    return [({"input_ids": one}, {"text": torch.ones_like(one) > 0}) for one in ids]


@pytest.fixture
def small() -> Any:
    return ml.wrap(towers.vision_model())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_nan_names_layer_and_sample(small: Any, bad: float) -> None:
    passes = 0

    def poison(module: Any, args: Any, x: Tensor) -> Tensor:
        nonlocal passes
        passes += 1
        if passes in (2, 5):  # the second pass of each run
            x = x.clone()
            x[1, 2, 4] = bad
        return x

    access.mlps(small)[1].activation.register_forward_hook(poison)
    message = r"^sample 1, row 1: NaN or infinite activations in layer 1 .*blocks\.1\."
    analyzers = (LayerZero(), Sparsity(), ml.ImportanceAnalyzer())
    with pytest.raises(ml.SampleError, match=message):
        run(small, pairs(), *analyzers)
    assert [one.samples for one in analyzers] == [2, 2, 2]  # of the first pass
    passes = 3
    again = (LayerZero(), Sparsity(), ml.ImportanceAnalyzer())
    run(small, pairs(), *again, on_error="skip")
    assert [(one.samples, one.skipped) for one in again] == [(4, 1)] * 3
    passes = 100
    others = LayerZero()
    run(small, [pairs()[0], pairs()[2]], others)
    assert torch.equal(again[0]["x"], others["x"])


def test_rows_of_a_pair_have_places_of_their_own(small: Any) -> None:
    found = run(small, pairs(), Places()).tolist()
    assert {place for place, *_ in found} == {0, 1, 2, 1 << 40, 1 + (1 << 40), 2 + (1 << 40)}
    assert len({tuple(one) for one in found}) == 18


class LayerZero(ml.Analyzer[Tensor]):
    """Reads one point, which is fine where another is not."""

    def points(self, model: Any) -> list[ml.Point]:
        return ml.activation_points(model)[:1]

    def see(self, x: Tensor, point: ml.Point, batch: ml.Batch) -> None:
        self.sum("x", x.sum((0, 1)))

    def result(self) -> Tensor:
        found: Tensor = self["x"]
        return found


class Picky(LayerZero):
    def see(self, x: Tensor, point: ml.Point, batch: ml.Batch) -> None:
        self.sum("x", 1)
        if "sample 1" in batch.ids:
            raise ml.SampleError("sample 1: not to my taste")


def test_nothing_is_folded_of_a_pass_that_another_analyzer_refuses(small: Any) -> None:
    first, second = LayerZero(), Picky()
    with pytest.raises(ml.SampleError, match="not to my taste"):
        run(small, pairs(1), first, second)
    assert (first.samples, second.samples) == (1, 1)
    first, second = LayerZero(), Picky()
    run(small, pairs(1), first, second, on_error="skip")
    assert (first.samples, first.skipped, int(second["x"])) == (2, 1, 2)
    run(small, [pairs(1)[0], pairs(1)[2]], alone := LayerZero())
    assert torch.equal(first["x"], alone["x"])


def test_nan_that_see_makes_is_told_from_the_models(small: Any) -> None:
    class Mean(LayerZero):
        def see(self, x: Tensor, point: ml.Point, batch: ml.Batch) -> None:
            self.sum("mean of none", x[~batch.real].mean())

    with pytest.raises(ml.SampleError, match=r"Mean\.see made NaN .* 'mean of none'"):
        run(small, pairs(), Mean())


# What is shared, and other points than activations.


class NeedsSums(LayerZero):
    def needs(self) -> list[AttentionSums]:
        return [AttentionSums()]

    def see(self, x: Tensor, point: ml.Point, batch: ml.Batch) -> None:
        self.sum("x", AttentionSums().of_layer(batch, point.layer).sum())


def test_attention_sums_are_computed_once(small: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    kernel = kernels.fused_attention_sums

    def count(*args: Any, **options: Any) -> Tensor:
        calls.append(options["causal"])
        return kernel(*args, **options)

    monkeypatch.setattr(kernels, "fused_attention_sums", count)
    layers = len(access.mlps(small))
    alone = run(small, pairs(), ml.ImportanceAnalyzer())
    assert len(calls) == 3 * layers
    calls.clear()
    both = run(small, pairs(), ml.ImportanceAnalyzer(), NeedsSums(), ml.ImportanceAnalyzer())
    assert len(calls) == 3 * layers
    assert torch.equal(both[0].values, alone.values)
    assert torch.equal(both[2].values, alone.values)
    assert float(both[1]) > 0
    calls.clear()
    run(small, pairs(), ml.ImportanceAnalyzer("causal"), ml.ImportanceAnalyzer())
    assert sorted(calls) == [False] * 3 * layers + [True] * 3 * layers


class Residuals(ml.Analyzer[Tensor]):
    def points(self, model: Any) -> list[ml.Point]:
        return ml.residual_points(model)

    def see(self, x: Tensor, point: ml.Point, batch: ml.Batch) -> None:
        self.sum("x", x[batch.real].sum(0), at=point.layer)

    def result(self) -> Tensor:
        found: Tensor = self["x"]
        return found


class Patterns(Residuals):
    def points(self, model: Any) -> list[ml.Point]:
        return ml.pattern_points(model)

    def see(self, x: Tensor, point: ml.Point, batch: ml.Batch) -> None:
        samples, pos = batch.real.shape
        assert x.shape == (samples, x.shape[1], pos, pos)
        rows = x.sum(-1).transpose(1, 2)[batch.real]
        torch.testing.assert_close(rows, torch.ones_like(rows))
        self.sum("x", (x * batch.real[:, None, :, None]).square().sum((0, 2, 3)), at=point.layer)


@pytest.mark.parametrize("kind", [Residuals, Patterns])
def test_residual_streams_and_patterns(
    shapes: Any, samples: list[ml.Sample], kind: Callable[[], Residuals]
) -> None:
    expected: Any = 0
    for sample in samples[:7]:
        _, cache = shapes.run_with_cache(**ml.inputs(shapes, sample.messages))
        if kind is Residuals:
            found = [cache[f"blocks.{n}.hook_out"][0].sum(0) for n in range(len(shapes.blocks))]
        else:
            names = [f"blocks.{n}.attn.hook_pattern" for n in range(len(shapes.blocks))]
            found = [cache[name][0].square().sum((1, 2)) for name in names]
        expected = expected + torch.stack(found).double()
    lengths = {ml.inputs(shapes, s.messages)["input"].shape[1] for s in samples[:7]}
    assert len(lengths) > 1  # some are padded
    for batch_size in (1, 7):
        result = run(shapes, samples[:7], kind(), batch_size=batch_size)
        torch.testing.assert_close(result, expected, atol=1e-3, rtol=1e-4)


class BothSites(ml.Analyzer[tuple[Tensor, Tensor]]):
    """The decoder and a tower in one."""

    def points(self, model: Any) -> list[ml.Point]:
        return [*ml.activation_points(model), *ml.activation_points(model, "vision")]

    def see(self, x: Tensor, point: ml.Point, batch: ml.Batch) -> None:
        self.sum(point.site, x[batch.real].sum(0), at=point.layer)

    def result(self) -> tuple[Tensor, Tensor]:
        return self["llm"], self["vision"]


@pytest.mark.parametrize("batch_size", [1, 4])
def test_points_of_two_sites(shapes: Any, samples: list[ml.Sample], batch_size: int) -> None:
    found = run(shapes, samples[:4], BothSites(), batch_size=batch_size)
    for site, sums in zip(("llm", "vision"), found, strict=True):
        x = read_by_hand(shapes, samples[:4], site)
        by_hand = torch.stack([torch.cat(layer).double().sum(0) for layer in x])
        torch.testing.assert_close(sums, by_hand, atol=1e-2, rtol=1e-4)


# What is said where the three methods are wrong.


def with_see(see: Callable[..., None]) -> ml.Analyzer[Any]:
    return type("Mine", (LayerZero,), {"see": see})()


def test_a_see_that_fails_is_no_bad_sample(small: Any) -> None:
    def see(self: Any, x: Tensor, point: ml.Point, batch: ml.Batch) -> None:
        raise ValueError("shapes do not fit")

    with pytest.raises(RuntimeError, match=r"Mine.see failed at blocks\.0\..*shapes do not fit"):
        run(small, pairs(), with_see(see), on_error="skip")


def test_state_of_two_kinds(small: Any) -> None:
    def both(self: Any, x: Tensor, point: ml.Point, batch: ml.Batch) -> None:
        self.sum("x", 1)
        self.sum("x", 1, at=0)

    def in_turn(self: Any, x: Tensor, point: ml.Point, batch: ml.Batch) -> None:
        self.sum("x", 1, at=0 if self.samples else None)

    def kinds(self: Any, x: Tensor, point: ml.Point, batch: ml.Batch) -> None:
        (self.max if self.samples else self.sum)("x", 1.0)

    def grows(self: Any, x: Tensor, point: ml.Point, batch: ml.Batch) -> None:
        self.sum("x", torch.zeros(1 + self.samples))

    def below(self: Any, x: Tensor, point: ml.Point, batch: ml.Batch) -> None:
        self.sum("x", 1, at=-1)

    def rows(self: Any, x: Tensor, point: ml.Point, batch: ml.Batch) -> None:
        self.keep("x", x[0], 3)

    for see, message in (
        (both, "'x' was a sum of shape .* without at=, and is given a .* with at="),
        (in_turn, "without at=, and is given a .* with at="),
        (kinds, "was a sum .* is given a max"),
        (grows, r"shape \(1,\) .* shape \(3,\) .* reduce over samples"),
        (below, "at=-1; places count from 0"),
        (rows, "3 rows for 2 samples and no ids"),
    ):
        with pytest.raises(RuntimeError, match=message):
            run(small, pairs(), with_see(see))


def test_points_that_are_not_there(small: Any) -> None:
    for points, message in (
        ([ml.Point("blocks.0.nonsense", 0)], "Mine.points names 'blocks.0.nonsense'.*hook_dict"),
        ([], "Mine.points names no point"),
    ):
        analyzer = type("Mine", (LayerZero,), {"points": lambda self, model, p=points: p})()
        with pytest.raises(ValueError, match=message):
            run(small, pairs(), analyzer)
        with pytest.raises(ValueError, match=message):
            analyzer.hooks(small)
    with pytest.raises(ValueError, match="'nowhere' is not a site"):
        run(small, pairs(), Sparsity("nowhere"))


def test_a_point_that_is_not_passed(small: Any) -> None:
    name = next(name for name in small.hook_dict if name.startswith("vision"))
    silent = type("Mine", (LayerZero,), {"points": lambda *_: [ml.Point(name, 0)]})()
    with pytest.raises(RuntimeError, match=f"{name} should have run 1 times in this pass, but ran"):
        run(small, pairs(), silent)


def test_unknown_state() -> None:
    with pytest.raises(KeyError, match="no state 'x'; there is nothing yet"):
        LayerZero().result()
    assert Sparsity().result() == {}
    assert Sparsity().modalities == Sparsity().labels == ()


def test_unknown_state_names_what_there_is(small: Any) -> None:
    run(small, pairs(), analyzer := LayerZero())
    with pytest.raises(KeyError, match="no state 'y'; there is x"):
        analyzer["y"]
    assert "x" in analyzer
    assert "y" not in analyzer


def test_what_cannot_be_merged(small: Any, shapes: Any, samples: list[ml.Sample]) -> None:
    with pytest.raises(ValueError, match=r"'threshold': 0\.5.*do not measure the same"):
        Careless(0.2) + Careless(0.5)
    with pytest.raises(TypeError, match="unsupported operand"):
        Sparsity() + LayerZero()  # type: ignore[operator]
    here, there = Sparsity(), Sparsity()
    run(small, pairs(), here)
    run(shapes, samples[:1], there)
    with pytest.raises(ValueError, match="layers"):
        here + there
    with pytest.raises(ValueError, match="layers"):
        run(shapes, samples[:1], here)


class Loss(LayerZero):
    """Cross-entropy of the next token, by the model's logits and by its head on what it reads."""

    needs_logits = True

    def __init__(self, model: Any) -> None:
        self._head = model.original_model.get_output_embeddings()

    def points(self, model: Any) -> list[ml.Point]:
        return [ml.Point("ln_final.hook_out", 0)]

    def see(self, x: Tensor, point: ml.Point, batch: ml.Batch) -> None:
        self.sum("by head", self.loss(self._head(x), batch))

    def finish(self, batch: ml.Batch) -> None:
        self.sum("by logits", self.loss(batch.output.logits, batch))

    def loss(self, logits: Tensor, batch: ml.Batch) -> Tensor:
        ids, both = batch.inputs["input_ids"], batch.real[:, 1:] & batch.real[:, :-1]
        losses = torch.nn.functional.cross_entropy(logits[:, :-1].mT, ids[:, 1:], reduction="none")
        return losses[both].sum()

    def result(self) -> Tensor:
        return torch.stack([self["by head"], self["by logits"]])


class HeadOnly(Loss):
    """Calls the head by itself, and leaves the model's logits to the last position."""

    needs_logits = False

    def finish(self, batch: ml.Batch) -> None:
        self.sum("by logits", batch.output.logits.shape[1])


def losses_by_hand(model: Any, samples: Iterable[ml.Sample]) -> float:
    total = 0.0
    for sample in samples:
        inputs = generation.prepare_inputs(model, [sample.messages])
        with torch.no_grad():
            logits = model.original_model(**inputs).logits
        ids = inputs["input_ids"]
        total += float(
            torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="sum")
        )
    return total


@pytest.mark.parametrize("batch_size", [1, 4])
def test_logits_of_all_positions(
    shapes: Any, samples: list[ml.Sample], batch_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = losses_by_hand(shapes, samples)
    together = run(shapes, samples, Loss(shapes), HeadOnly(shapes), batch_size=batch_size)
    assert together[0].tolist() == pytest.approx([expected, expected], rel=1e-5)
    forward = shapes.original_model.forward

    def old(*args: Any, **kwargs: Any) -> Any:  # a family whose forward has no logits_to_keep
        return forward(*args, **kwargs)

    for one in (forward, old):
        monkeypatch.setattr(shapes.original_model, "forward", one)
        alone = run(shapes, samples, HeadOnly(shapes), batch_size=batch_size)
        passes = -(-len(samples) // batch_size)
        assert alone.tolist() == pytest.approx([expected, passes], rel=1e-5)


def test_no_state_keeps_a_graph(shapes: Any, samples: list[ml.Sample]) -> None:
    analyzer = Loss(shapes)
    inputs = ml.inputs(shapes, samples[0].messages)
    assert torch.is_grad_enabled()
    shapes.run_with_hooks(inputs.pop("input"), fwd_hooks=analyzer.hooks(shapes), **inputs)
    assert not any(tensor.requires_grad for tensor in analyzer.state_dict().values())
    expected = losses_by_hand(shapes, samples[:1])
    assert analyzer.result().tolist() == pytest.approx([expected, expected], rel=1e-5)


@pytest.mark.parametrize(
    "options", [{}, {"use_cache": False}, {"cache_implementation": "static"}], ids=str
)
def test_generating_counts_the_prompt_once(
    shapes: Any, samples: list[ml.Sample], options: dict[str, Any]
) -> None:
    analyzers = [Sparsity(), Sparsity()]
    with shapes.hooks(fwd_hooks=analyzers[0].hooks(shapes)):
        for sample in samples[:2]:
            ml.generate(shapes, sample.messages, 4, min_new_tokens=4, **options)
    together = [sample.messages for sample in samples[:2]]
    lengths = {ml.inputs(shapes, messages)["input"].shape for messages in together}
    assert len(lengths) == 2, "one of them must be padded"
    with shapes.hooks(fwd_hooks=analyzers[1].hooks(shapes)):
        ml.generate(shapes, together, 4, min_new_tokens=4, **options)
    for analyzer in analyzers:
        assert analyzer.samples == 2
        close(analyzer.result(), sparsity_by_hand(shapes, samples[:2]))


def test_an_output_before_the_pass_is_over(small: Any) -> None:
    with pytest.raises(RuntimeError, match="use it in finish"):
        run(small, pairs(), with_see(lambda *given: given[-1].output))


@pytest.mark.parametrize("name", ["see", "finish"])
def test_a_value_error_of_the_authors_is_no_bad_sample(small: Any, name: str) -> None:
    analyzer = with_see(lambda *_: None)

    def wrong(*_: Any) -> None:
        raise ValueError("of the author's")

    setattr(analyzer, name, wrong)
    with pytest.raises(RuntimeError, match=f"{name} failed.*of the author's"):
        run(small, pairs(), analyzer, on_error="skip")


def test_a_value_error_of_a_shared_reader_is_no_bad_sample(
    small: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(*_: Any, **__: Any) -> None:
        raise ValueError("of a kernel")

    monkeypatch.setattr(kernels, "fused_attention_sums", wrong)
    with pytest.raises(RuntimeError, match=r"hook_rot_k failed: of a kernel"):
        run(small, pairs(), ml.ImportanceAnalyzer(), on_error="skip")


def shortened(x: Tensor, hook: Any) -> Tensor:
    return x[:, -1:]


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("make", [ml.ImportanceAnalyzer, ml.DomainAnalyzer, ml.AttributionAnalyzer])
def test_x_of_other_positions_than_the_masks(
    shapes: Any, samples: list[ml.Sample], make: Any, batch_size: int
) -> None:
    """X of one position is multiplied by that of many without a word."""
    labelled = [replace(one, label="a") for one in samples[:3]]
    with (
        shapes.hooks(fwd_hooks=[("blocks.2.mlp.act.hook_in", shortened)]),
        pytest.raises(RuntimeError, match=r"blocks\.2\.mlp\.act\.hook_out gives \[\d, 1, 384\]"),
    ):
        run(shapes, labelled, make(), batch_size=batch_size, on_error="skip")


class Reads(ml.Analyzer[None]):
    def __init__(self, name: str) -> None:
        self.name = name

    def points(self, model: Any) -> list[ml.Point]:
        return [ml.Point(self.name, 0)]

    def see(self, x: Tensor, point: ml.Point, batch: Any) -> None:
        self.sum("n", len(x))

    def result(self) -> None:
        return None


def test_positions_of_points_that_have_them_elsewhere(
    shapes: Any, samples: list[ml.Sample]
) -> None:
    for name in ("attn.hook_pattern", "attn.hook_rot_q", "attn.hook_q", "hook_out"):
        run(shapes, samples[:2], Reads(f"blocks.1.{name}"))
    with pytest.raises(RuntimeError, match="reads logits sets needs_logits"):
        run(shapes, samples[:2], Reads("unembed.hook_out"))
    reader = Reads("unembed.hook_out")
    reader.needs_logits = True
    run(shapes, samples[:2], reader)

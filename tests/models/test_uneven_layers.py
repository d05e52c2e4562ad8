"""A decoder of which some layers have experts and others one MLP, with fewer neurons."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import silu

import miner_lens as ml
from miner_lens import experiments
from miner_lens.experiments.necessity import necessity_plan
from miner_lens.models import access as models
from miner_lens.models.description import describe
from miner_lens.models.identity import ModelIdentity
from miner_lens.scoring import select
from miner_lens.scoring.scores import ImportanceScores
from tests.families import Inputs
from tests.models.test_experts import EXPERTS, UNITS, WIDTH, qwen3_moe
from tests.models.test_families import Spy, generated, logits, pattern
from tests.parts import Part
from tests.scoring.test_kernels import twin

DENSE = 48  # the neurons of layer 0; layer 1 has four experts of 24
TOTAL = DENSE + WIDTH
UNEVEN = ModelIdentity("one", "Any", 2, 6, widths=(2, 6))

pytestmark = pytest.mark.filterwarnings("ignore:TransformerLens rebuilds")


class Family:
    """The tiny model, its plain copy, and its scores."""

    def __init__(self) -> None:
        model, self.inputs = qwen3_moe(mlp_only_layers=[0])
        self.untouched = copy.deepcopy(model)
        self.bridge = ml.wrap(model)
        self.real = self.inputs["attention_mask"].bool()
        self.masks = models.layout(self.bridge).masks(self.inputs["input_ids"], self.real)
        self.data = [(self.inputs, self.masks)]
        self.scores = ml.mine(self.bridge, self.data, progress=False)

    def zeroed(self, neurons: Any) -> Any:
        edited = copy.deepcopy(self.untouched)
        first, second = (layer.mlp for layer in edited.model.layers)
        with torch.no_grad():
            for layer, neuron in neurons:
                if layer == 0:
                    first.down_proj.weight[:, neuron] = 0
                else:
                    expert, unit = divmod(neuron, UNITS)
                    second.experts.down_proj[expert, :, unit] = 0
        return edited


@pytest.fixture(scope="module")
def family() -> Family:
    return Family()


def activations(model: Any, inputs: Inputs) -> list[Tensor]:
    """X of both layers, [batch pos neuron], from what each is given."""
    seen: list[Tensor] = []
    first, second = (layer.mlp for layer in model.model.layers)

    def routed(experts: Any, args: tuple[Tensor, ...]) -> None:
        hidden, index, _ = args
        x = torch.zeros(len(hidden), EXPERTS, UNITS)
        for token, chosen in enumerate(index.tolist()):
            for expert in chosen:
                x[token, expert] = silu(experts.gate_up_proj[expert][:UNITS] @ hidden[token])
        seen.append(x.view(*inputs["input_ids"].shape, WIDTH))

    first.register_forward_pre_hook(lambda mlp, args: seen.append(silu(mlp.gate_proj(args[0]))))
    second.experts.register_forward_pre_hook(routed)
    logits(model, inputs)
    return seen


def test_scores_are_those_of_the_definition(family: Family) -> None:
    found = activations(copy.deepcopy(family.untouched), family.inputs)
    part = Part("model.layers", "mlp", "self_attn", "")
    spy = Spy(copy.deepcopy(family.untouched), family.inputs, part)
    for layer, (x, ((q, k, _),)) in enumerate(zip(found, spy.calls, strict=True)):
        expected = []
        for sample, real in enumerate(family.real):
            p = pattern(q[sample][:, real], k[sample][:, real])
            own = torch.stack([mask[sample, real] for mask in family.masks.values()])
            expected.append(twin(x[sample, real], p, own))
        ours = family.scores.values[:, :, layer, : x.shape[-1]]
        mean = torch.stack(expected).mean(0).float()
        torch.testing.assert_close(ours, mean, atol=1e-5, rtol=0)
    assert not family.scores.values[:, :, 0, DENSE:].any()
    assert family.scores.means is not None
    assert not family.scores.means[:, 0, DENSE:].any()


def test_ablation_is_zeroed_weights(family: Family) -> None:
    chosen = [(0, n) for n in range(0, DENSE, 3)] + [(1, n) for n in range(0, WIDTH, 5)]
    known = ml.NeuronSet.of(chosen, family.bridge)
    nameless = ml.NeuronSet(chosen, layers=2, neurons=WIDTH)
    others = list(~known)
    assert len(others) == TOTAL - len(chosen)
    expected = {False: logits(family.zeroed(chosen), family.inputs)[family.real]}
    expected[True] = logits(family.zeroed(others), family.inputs)[family.real]
    before = logits(family.bridge, family.inputs)
    for neurons in (known, nameless):
        for complement, theirs in expected.items():
            with ml.ablate(family.bridge, neurons, complement=complement):
                ours = logits(family.bridge, family.inputs)[family.real]
                tokens = generated(family.bridge, family.inputs)
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
        assert torch.equal(tokens, generated(family.zeroed(others), family.inputs))
    assert torch.equal(logits(family.bridge, family.inputs), before)


def test_ratios_and_controls_count_neurons_that_exist(family: Family) -> None:
    everything = family.scores.select(1.0, "adaptive")
    assert sum(map(len, everything.values())) == TOTAL
    assert sum(everything.overview()["share"]) == pytest.approx(1)
    for strategy in select.STRATEGIES:
        for chosen in family.scores.select(0.5, strategy).values():
            assert not (chosen.mask & ~chosen.exists).any()
    half = ml.NeuronSet.union(family.scores.select(0.5, "adaptive"))
    assert len(half) == TOTAL // 2
    assert "of 144 neurons" in repr(half)
    assert half.overview()["share"][0] == half.counts()[0] / DENSE
    assert len(ml.NeuronSet.random(TOTAL, half)) == TOTAL
    assert ml.NeuronSet.random_like(half).counts() == half.counts()
    assert len(family.scores.to_frame()) == TOTAL * len(family.scores.modalities) * 5
    with pytest.raises(ValueError, match="no neuron 50 in layer 0, which has 48"):
        ml.NeuronSet.of([(0, 50)], family.bridge)
    with pytest.raises(ValueError, match="Cannot draw 145"):
        ml.NeuronSet.random(TOTAL + 1, half)
    text = ml.NeuronSet.of([(0, n) for n in range(24)], family.bridge)
    found = experiments.overlap({"one": text, "two": text}).frame
    both = found[(found["combination"] == "one & two") & (found["layer"] == 0)]
    assert both["expected"].item() == pytest.approx(24 * 24 / DENSE)
    plan = necessity_plan(family.scores, ["text"], [0.0, 0.5, 1.0])
    sizes = {len(c.neurons) for row in plan.rows for c in row.conditions if c.neurons is not None}
    assert sizes == {0, TOTAL // 2, TOTAL}


def test_other_analyzers_leave_out_what_does_not_exist(family: Family) -> None:
    counts = ml.run(
        family.bridge,
        family.data,
        ml.KindAnalyzer(medium="text", top=2),
        progress=False,
    )
    assert sum(counts.overview()["neurons"]) == TOTAL
    assert sum(map(len, counts.select().values())) == TOTAL


@pytest.mark.parametrize("strategy", ["adaptive", "LA_MU", "LU_MA", "uniform", "contrastive"])
def test_selection_is_that_of_a_naive_twin(strategy: str) -> None:
    """Scores below those that fill the gaps, so that a gap would be chosen if it counted."""
    torch.manual_seed(0)
    values = torch.rand(1, 2, 2, 6) - 2
    values[..., ~UNEVEN.exists] = 0
    scores = ImportanceScores(
        values, ["text", "image"], metrics=["mean"], occurrences=[1, 1], identity=UNEVEN
    )
    chosen = scores.select(0.5, strategy)
    cells = [(m, layer, n) for m in range(2) for layer, w in ((0, 2), (1, 6)) for n in range(w)]
    value = {cell: values[0, *cell].item() for cell in cells}

    def top(among: Any, k: int, key: Any = value.get) -> list[tuple[int, int, int]]:
        return sorted(among, key=lambda cell: -key(cell))[:k]

    def of(*want: tuple[int, int]) -> list[tuple[int, int, int]]:
        return [c for c in cells if all(c[axis] == at for axis, at in want)]

    def lead(cell: tuple[int, int, int]) -> float:
        return value[cell] - value[1 - cell[0], cell[1], cell[2]]

    k = 4  # half of eight
    expected = {
        "adaptive": [
            max((m, *c[1:]) for m in range(2) if value[m, *c[1:]] >= value[1 - m, *c[1:]])
            for c in top(of((0, 0)), k, lambda c: value[c] + value[1, c[1], c[2]])
        ],
        "LA_MU": [c for m in range(2) for c in top(of((0, m)), k // 2)],
        "LU_MA": [c for layer in range(2) for c in top(of((1, layer)), k // 2)],
        "uniform": [c for m in range(2) for n in range(2) for c in top(of((0, m), (1, n)), 1)],
        "contrastive": [c for m in range(2) for c in top(of((0, m)), k // 2, lead)],
    }[strategy]
    ours = [(m, *pair) for m, one in enumerate(chosen.values()) for pair in one]
    assert sorted(ours) == sorted(expected)


def test_identities(tmp_path: Path, family: Family) -> None:
    assert (UNEVEN.total, UNEVEN.exists.sum()) == (8, 8)
    assert ModelIdentity.from_dict(UNEVEN.to_dict()) == UNEVEN
    other = ModelIdentity("two", "Any", 2, 6, widths=(6, 2))
    with pytest.raises(ValueError, match=r"layers of 2, 6 neurons.*layers of 6, 2 neurons"):
        UNEVEN.check(other)
    assert ModelIdentity("one", "Any", 2, 6, widths=(6, 6)).widths is None
    with pytest.raises(ValueError, match="expected 3 of at most 6"):
        ModelIdentity("one", "Any", 3, 6, widths=(2, 6))
    family.scores.save(tmp_path / "scores.safetensors")
    again = ImportanceScores.load(tmp_path / "scores.safetensors")
    assert again.identity == family.scores.identity
    assert again.total == TOTAL
    found = describe(family.bridge)
    assert found.sites[0].per_layer == "96 (layer 0: 48)"
    assert "llm: 4 experts of 24 neurons each" in str(found)


def test_baked_models_are_ablated_ones(family: Family, tmp_path: Path) -> None:
    neurons = family.scores.select(0.3)["text"]
    plain = copy.deepcopy(family.untouched)
    path = ml.bake(plain, neurons.transfer(plain), tmp_path / "baked")
    baked = type(plain).from_pretrained(path).eval()
    theirs = logits(family.zeroed(neurons), family.inputs)
    torch.testing.assert_close(
        logits(baked, family.inputs)[family.real], theirs[family.real], atol=1e-5, rtol=0
    )

"""Totals: how they merge must not depend on what was dealt to whom, nor on the order."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import reduce
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from miner_lens import files
from miner_lens.running.totals import KINDS, Keep, Max, Min, Sum, Top, Totals

# How each kind is made of some rows [row cell] with their ids [row part].
MAKE: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "sum": lambda rows, ids: Sum({"value": rows.sum(0)}).settled(),
    "max": lambda rows, ids: Max({"value": rows.amax(0)}),
    "min": lambda rows, ids: Min({"value": rows.amin(0)}),
    "top": lambda rows, ids: Top.of(rows, ids, 3),
    "keep": lambda rows, ids: Keep.of(rows, ids, 3, seed=7),
}

# Small whole numbers, so that sums are exact and many values are equal.
rows = st.lists(st.tuples(*[st.integers(-4, 4)] * 2), min_size=1, max_size=12).map(
    lambda drawn: torch.tensor(drawn, dtype=torch.float32)
)
orders = st.randoms(use_true_random=False)


def ids_of(table: Tensor) -> Tensor:
    index = torch.arange(len(table))
    return torch.stack([index // 2, index % 2], -1)


def dealt(table: Tensor, order: random.Random) -> list[tuple[Tensor, Tensor]]:
    """The rows in any order, in some portions."""
    places = list(range(len(table)))
    order.shuffle(places)
    cuts = sorted(order.sample(range(1, len(table)), order.randint(0, len(table) - 1)))
    parts = [places[a:b] for a, b in zip([0, *cuts], [*cuts, len(table)], strict=True)]
    return [(table[part], ids_of(table)[part]) for part in parts]


def alike(one: Any, two: Any) -> None:
    assert (type(one), one.at, set(one.parts)) == (type(two), two.at, set(two.parts))
    for part, tensor in one.parts.items():
        assert tensor.dtype == two.parts[part].dtype
        assert torch.equal(tensor, two.parts[part]), part


def test_every_kind_is_tried() -> None:
    assert set(MAKE) == set(KINDS)


@pytest.mark.parametrize("kind", MAKE)
@given(rows, orders)
@settings(deadline=None, max_examples=50)
def test_portions_are_one_batch(kind: str, table: Tensor, order: random.Random) -> None:
    whole = MAKE[kind](table, ids_of(table))
    alike(reduce(lambda a, b: a + b, (MAKE[kind](*part) for part in dealt(table, order))), whole)


@pytest.mark.parametrize("kind", MAKE)
@given(rows, rows, rows)
@settings(deadline=None, max_examples=50)
def test_merging_is_associative_and_commutative(kind: str, a: Tensor, b: Tensor, c: Tensor) -> None:
    table = torch.cat([a, b, c])
    one, two, three = (
        MAKE[kind](rows, ids)
        for rows, ids in zip((a, b, c), ids_of(table).split([len(a), len(b), len(c)]), strict=True)
    )
    alike((one + two) + three, one + (two + three))
    alike(one + two, two + one)


@given(st.lists(st.tuples(st.sampled_from(sorted(MAKE)), st.integers(0, 3), rows), max_size=8))
@settings(deadline=None, max_examples=50)
def test_totals_by_place_are_totals_of_each_place(given: list[tuple[str, int, Tensor]]) -> None:
    """What is named with `at=`, in one pass or several, in a file or not."""
    given = [one for one in given if one[0] != "keep"]
    together, apart, saved = Totals(), Totals(), Totals()
    for kind, at, table in given:
        for totals in (together, apart):
            totals.add(kind, MAKE[kind](table, ids_of(table)), at)
        apart.fold()
        saved.merge(kind, apart_of(kind, at, table))
        saved = Totals.from_state_dict(saved.state_dict())
    together.fold()
    assert set(together.named) == {kind for kind, *_ in given}
    for kind, total in together.named.items():
        alike(total, apart.named[kind])
        alike(total, saved.named[kind])
        for place in range(len(next(iter(total.parts.values())))):
            here = [MAKE[k](t, ids_of(t)) for k, at, t in given if (k, at) == (kind, place)]
            for part, tensor in total.parts.items():
                if here:
                    expected = reduce(lambda a, b: a + b, here).parts[part]
                    assert torch.equal(tensor[place], expected)
                else:
                    assert (tensor[place] == total.nothing[part]).all()


def apart_of(kind: str, at: int, table: Tensor) -> Any:
    totals = Totals()
    totals.add(kind, MAKE[kind](table, ids_of(table)), at)
    return totals.ready()[kind]


@given(rows, st.lists(st.sampled_from(["a/b", "at", "", "é.x", "top"]), unique=True))
@settings(deadline=None, max_examples=20)
def test_files_give_back_what_was_saved(
    tmp_path_factory: Any, table: Tensor, names: list[str]
) -> None:
    totals = Totals()
    for place, name in enumerate(names):
        for kind, make in MAKE.items():
            totals.add(
                f"{kind}{name}", make(table, ids_of(table)), None if kind == "keep" else place
            )
    totals.fold()
    path: Path = tmp_path_factory.mktemp("totals") / "saved"
    files.write(path, "test", totals.state_dict(), {})
    again = Totals.from_state_dict(files.read(path, "test")[0])
    assert list(again.named) == list(totals.named)
    for name, total in totals.named.items():
        assert (again.named[name].kind, again.named[name].at) == (total.kind, total.at)
        for part, tensor in total.parts.items():
            assert torch.equal(again.named[name].parts[part], tensor)


# Each kind against its definition.


@given(rows, st.integers(1, 5))
@settings(deadline=None, max_examples=50)
def test_top_has_the_largest_and_their_ids(table: Tensor, k: int) -> None:
    top = Top.of(table, ids_of(table), k)
    for cell, column in enumerate(table.T.tolist()):
        expected = sorted(column, reverse=True)[:k]
        assert top.values[:, cell].tolist() == expected + [-torch.inf] * (k - len(expected))
        ids = [tuple(one) for one in top.ids[:, cell].tolist()]
        having = [column[2 * index + part] for index, part in ids if index >= 0]
        assert having == expected
        assert len(set(ids[: len(expected)])) == len(expected)
        assert ids[len(expected) :] == [(-1, -1)] * (k - len(expected))


def test_top_of_negative_and_of_tiny_values() -> None:
    values = torch.tensor([-1e30, -1.0, -1e-30, -0.0, 1e-40, 2.0, 3e38, -3e38])
    top = Top.of(values[torch.randperm(8)], torch.arange(8), 8)
    assert top.values.tolist() == values.sort(descending=True).values.tolist()


def test_equal_values_stay_by_lot() -> None:
    tops = [Top.of(torch.zeros(1000), torch.arange(1000) + shift, 10) for shift in (0, 5000)]
    for top, shift in zip(tops, (0, 5000), strict=True):
        assert 300 < float((top.ids - shift).float().mean()) < 700  # not the first ten


@pytest.mark.parametrize("passes", [1, 1000], ids=["in one pass", "in many"])
def test_sums_are_exact_where_float32_is_not(passes: int) -> None:
    assert float(torch.tensor(1e8) + torch.tensor(0.25)) == 1e8
    totals = Totals()
    for number in range(1001):
        totals.add("x", Sum({"value": torch.tensor(0.25 if number else 1e8)}))
        totals.add("flags", Sum({"value": torch.tensor([True, False])}))
        if passes > 1:
            totals.fold()
    totals.fold()
    assert float(totals.named["x"].value) == 1e8 + 250
    assert totals.named["flags"].value.tolist() == [1001, 0]


@pytest.mark.parametrize("ids", ["consecutive", "places", "far"])
def test_every_row_has_the_same_chance_to_be_kept(ids: str) -> None:
    """30 of 300 rows, under 400 seeds: each is kept 40 times, with a deviation of 6."""
    index = torch.arange(300)
    given = {"consecutive": index, "far": index * 2**33}
    given["places"] = torch.stack([index // 30, index % 30], -1)
    counts = torch.zeros(300)
    for seed in range(400):
        kept = Keep.of(index, given[ids], 30, seed).value
        counts[kept] += 1
        assert len(set(kept.tolist())) == 30
    assert 4.5 < float(counts.std()) < 7.5
    assert counts.min() > 14
    assert counts.max() < 66
    thirds = counts.view(3, 100).sum(1)
    assert float((thirds - 4000).abs().max()) < 300


def test_no_rows_of_a_modality_are_no_rows() -> None:
    """As where a mask is empty in one pass and not in another."""
    ids = torch.tensor([[4, 0], [4, 1]])
    rows = torch.tensor([[1.0], [2.0]])
    none = (rows[:0], ids[:0])
    kept = Keep.of(*none, 3, 0) + Keep.of(rows, ids, 3, 0)
    assert torch.equal(kept.value.sort(0).values, rows)
    top = Top.of(*none, 2) + Top.of(rows, ids, 2)
    assert torch.equal(top.ids[:, 0], ids.flip(0))


def test_ids_of_each_cell() -> None:
    values = torch.tensor([[1.0, 4.0], [3.0, 2.0]])
    ids = torch.tensor([[[7, 1], [7, 2]], [[8, 3], [8, 4]]])
    top = Top.of(values, ids, 1)
    assert top.ids.tolist() == [[[8, 3], [7, 2]]]

"""What an analyzer keeps: named tensors, each of which knows how two of it merge.

A total of any kind has tensors by which it is saved, and `+`. None of them depends on the order in
which samples come, nor on which process has seen them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Int64
from torch import Tensor

Tensors = dict[str, Tensor]


def wide(value: Any) -> Tensor:
    """float64 (or int64) where the device has it, so that sums over many samples stay exact."""
    tensor = torch.as_tensor(value).detach()
    if not tensor.is_floating_point():
        return tensor.long()
    return tensor if tensor.device.type == "mps" else tensor.double()


@dataclass(frozen=True)
class Elementwise:
    """A sum, a maximum or a minimum, element by element.

    Attributes:
        tensor: The total; of one with `at`, [at ...].
        at: Whether the first axis counts the places that `at=` named.
    """

    kind: ClassVar[str]
    start: ClassVar[float]
    tensor: Tensor
    at: bool = False

    def tensors(self) -> Tensors:
        """What is saved of it."""
        return {"at" if self.at else "": self.tensor}

    @classmethod
    def from_tensors(cls, saved: Tensors) -> Any:
        """The total that `tensors` gave."""
        ((key, tensor),) = saved.items()
        return cls(tensor, key == "at")

    @classmethod
    def stack(cls, by_place: dict[int, Any]) -> Any:
        """One total with a first axis, of the totals at some places of it."""
        some = next(iter(by_place.values())).tensor
        rows = [
            by_place[n].tensor.to(some.device) if n in by_place else cls._fill(some)
            for n in range(max(by_place) + 1)
        ]
        return cls(torch.stack(rows), at=True)

    def __add__(self, other: Any) -> Any:
        one, two = self.tensor, other.tensor.to(self.tensor.device)
        if self.at and len(one) != len(two):
            one, two = (self._longer(t, max(len(one), len(two))) for t in (one, two))
        return type(self)(self._join(one, two), self.at)

    @classmethod
    def _fill(cls, like: Tensor) -> Tensor:
        return torch.full_like(like, 0 if cls.start == 0 else _extreme(like, cls.start))

    @classmethod
    def _longer(cls, tensor: Tensor, length: int) -> Tensor:
        more = tensor[:1].expand(length - len(tensor), *tensor.shape[1:])
        return torch.cat([tensor, cls._fill(more)])

    @staticmethod
    def _join(one: Tensor, two: Tensor) -> Tensor:
        raise NotImplementedError


class Sum(Elementwise):
    """Adds up, in float64 or int64."""

    kind, start = "sum", 0.0

    @staticmethod
    def _join(one: Tensor, two: Tensor) -> Tensor:
        return one + two


class Max(Elementwise):
    """Keeps the largest of each element."""

    kind, start = "max", -1.0

    @staticmethod
    def _join(one: Tensor, two: Tensor) -> Tensor:
        return torch.maximum(one, two)


class Min(Elementwise):
    """Keeps the smallest of each element."""

    kind, start = "min", 1.0

    @staticmethod
    def _join(one: Tensor, two: Tensor) -> Tensor:
        return torch.minimum(one, two)


@dataclass(frozen=True)
class Top:
    """The k largest values of each cell and the ids of what had them; of equal ones, lower ids.

    Attributes:
        values: [*at k *cell], falling; -inf where there were fewer.
        ids: [*at k *cell part]; -1 where there were fewer.
        at: Whether the first axis counts places.
    """

    kind: ClassVar[str] = "top"
    values: Tensor
    ids: Int64[Tensor, "..."]
    at: bool = False

    @classmethod
    def of(cls, values: Tensor, ids: Tensor, k: int) -> Top:
        """The top of some candidates: values [candidate *cell], ids [candidate *part]."""
        values = values.detach()
        ids = ids.to(values.device).long().reshape(len(values), *(1,) * (values.ndim - 1), -1)
        ids = ids.expand(*values.shape, ids.shape[-1])
        missing = max(0, k - len(values))
        more = values.new_full((missing, *values.shape[1:]), -torch.inf)
        none = ids.new_full((missing, *ids.shape[1:]), -1)
        return cls(*_largest(torch.cat([values, more]), torch.cat([ids, none]), k, 0))

    def tensors(self) -> Tensors:
        """What is saved of it."""
        at = "at." if self.at else ""
        return {f"{at}values": self.values, f"{at}ids": self.ids}

    @classmethod
    def from_tensors(cls, saved: Tensors) -> Top:
        """The total that `tensors` gave."""
        at = "at.values" in saved
        prefix = "at." if at else ""
        return cls(saved[f"{prefix}values"], saved[f"{prefix}ids"], at)

    @classmethod
    def stack(cls, by_place: dict[int, Top]) -> Top:
        """One total with a first axis, of the totals at some places of it."""
        some = next(iter(by_place.values()))
        device = some.values.device
        none = cls(torch.full_like(some.values, -torch.inf), torch.full_like(some.ids, -1))
        rows = [by_place.get(n, none) for n in range(max(by_place) + 1)]
        return cls(
            torch.stack([row.values.to(device) for row in rows]),
            torch.stack([row.ids.to(device) for row in rows]),
            at=True,
        )

    def __add__(self, other: Top) -> Top:
        axis, device = int(self.at), self.values.device
        values = torch.cat([self.values, other.values.to(device)], axis)
        ids = torch.cat([self.ids, other.ids.to(device)], axis)
        return Top(*_largest(values, ids, self.values.shape[axis], axis), at=self.at)


@dataclass(frozen=True)
class Keep:
    """A sample of rows in which each has the same chance, however the data are dealt.

    Attributes:
        rows: [row ...], in the order of their lots.
        lots: A number drawn for each row from the seed and its id; the lowest stay.
        size: How many rows may stay.
    """

    kind: ClassVar[str] = "keep"
    rows: Tensor
    lots: Int64[Tensor, " row"]
    size: int

    @classmethod
    def of(cls, rows: Tensor, ids: Tensor, size: int, seed: int) -> Keep:
        """What stays of some rows; ids [row *part] are theirs alone."""
        rows = rows.detach()
        lots = torch.full((len(rows),), seed, dtype=torch.long, device=rows.device)
        for part in ids.to(rows.device).long().reshape(len(rows), -1).T:
            lots = _mixed(lots ^ part)
        return cls._lowest(rows, lots, size)

    @classmethod
    def _lowest(cls, rows: Tensor, lots: Tensor, size: int) -> Keep:
        order = lots.argsort()[:size]
        return cls(rows[order], lots[order], size)

    def tensors(self) -> Tensors:
        """What is saved of it."""
        return {"rows": self.rows, "lots": self.lots, "size": torch.tensor(self.size)}

    @classmethod
    def from_tensors(cls, saved: Tensors) -> Keep:
        """The total that `tensors` gave."""
        return cls(saved["rows"], saved["lots"], int(saved["size"]))

    def __add__(self, other: Keep) -> Keep:
        device = self.rows.device
        rows = torch.cat([self.rows, other.rows.to(device)])
        return self._lowest(rows, torch.cat([self.lots, other.lots.to(device)]), self.size)


KINDS: dict[str, Any] = {one.kind: one for one in (Sum, Max, Min, Top, Keep)}


def _largest(values: Tensor, ids: Tensor, k: int, axis: int) -> tuple[Tensor, Tensor]:
    """The k largest along an axis; the order of ids decides between equal ones."""
    # Sorts are stable, so the last key is sorted by first. A missing id (-1) goes last.
    for part in reversed(range(ids.shape[-1])):
        key = ids[..., part]
        order = torch.where(key < 0, torch.iinfo(torch.long).max, key).argsort(axis, stable=True)
        values, ids = _ordered(values, ids, order, axis)
    order = values.argsort(axis, descending=True, stable=True).narrow(axis, 0, k)
    return _ordered(values, ids, order, axis)


def _ordered(values: Tensor, ids: Tensor, order: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    wide_order = order[..., None].expand(*order.shape, ids.shape[-1])
    return values.gather(axis, order), ids.gather(axis, wide_order)


def _mixed(number: Tensor) -> Tensor:
    """A well mixed number of each number, the same on every machine (SplitMix64)."""
    number = number + -7046029254386353131
    for shift, factor in ((30, -4658895280553007687), (27, -7723592293110705685)):
        number = (number ^ _shifted(number, shift)) * factor
    return number ^ _shifted(number, 31)


def _shifted(number: Tensor, bits: int) -> Tensor:
    """A right shift that brings in zeros, which torch's on signed numbers does not."""
    return (number >> bits) & ((1 << (64 - bits)) - 1)


def _extreme(like: Tensor, sign: float) -> float:
    if like.is_floating_point():
        return sign * float("inf")
    info = torch.iinfo(like.dtype)
    return info.max if sign > 0 else info.min

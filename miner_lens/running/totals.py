"""What an analyzer keeps: named tensors, each of which knows how two of it merge.

A total depends neither on the order in which samples come nor on which process has seen them.
"""

from __future__ import annotations

from typing import Any, ClassVar, Self

import torch
from torch import Tensor

Tensors = dict[str, Tensor]


class Total:
    """A tensor, or several that belong together, with `+`.

    Attributes:
        parts: The tensors, [*at ...] each.
        at: Whether the first axis counts places, such as layers.
    """

    kind: ClassVar[str]
    nothing: ClassVar[dict[str, float]]  # what is at a place that nothing was added to
    combine: ClassVar[Any]

    def __init__(self, parts: Tensors, at: bool = False) -> None:
        self.parts, self.at = parts, at

    @property
    def value(self) -> Any:
        """What an analyzer reads."""
        return self.parts["value"]

    @property
    def shape(self) -> tuple[int, ...]:
        """What has to be alike in each pass."""
        return self._main.shape[self.at :]

    @classmethod
    def stack(cls, by_place: dict[int, Self]) -> Self:
        """One total with a first axis, of the totals at some places of it."""
        places, parts = range(max(by_place) + 1), {}
        for part, like in next(iter(by_place.values())).parts.items():
            nothing = torch.full_like(like, cls.nothing[part])
            rows = [by_place[n].parts[part] if n in by_place else nothing for n in places]
            parts[part] = torch.stack([row.to(like.device) for row in rows])
        return cls(parts, at=True)

    def settled(self) -> Self:
        """Itself in the dtype in which it is kept."""
        return self

    def is_sound(self) -> Tensor:
        """Whether all that was added is finite; it stays on its device."""
        nothing, finite = next(iter(self.nothing.values())), self._main.isfinite()
        return (finite if nothing == 0 else finite | (self._main == nothing)).all()

    def __add__(self, other: Self) -> Self:
        others = {part: other.parts[part].to(own.device) for part, own in self.parts.items()}
        if not self.at:
            return type(self)(self._join(self.parts, others, 0))
        length = max(len(self._main), len(other._main))
        one, two = (self._longer(parts, length) for parts in (self.parts, others))
        return type(self)(self._join(one, two, 1), at=True)

    @property
    def _main(self) -> Tensor:
        return self.parts[next(iter(self.nothing))]

    @classmethod
    def _longer(cls, parts: Tensors, length: int) -> Tensors:
        return {
            part: torch.cat([t, t.new_full((length - len(t), *t.shape[1:]), cls.nothing[part])])
            for part, t in parts.items()
        }

    @classmethod
    def _join(cls, one: Tensors, two: Tensors, axis: int) -> Tensors:
        """Two put together; `axis` is the first after that of places."""
        return {"value": cls.combine(one["value"], two["value"])}


class Sum(Total):
    """Adds up, in float64 (int64 for whole numbers), so that many samples stay exact."""

    kind, nothing, combine = "sum", {"value": 0}, torch.add

    def settled(self) -> Self:
        """In float64 or int64."""
        return type(self)({"value": _wide(self.value)}, self.at)


class Max(Total):
    """Keeps the largest of each element."""

    kind, nothing, combine = "max", {"value": -torch.inf}, torch.maximum


class Min(Total):
    """Keeps the smallest of each element."""

    kind, nothing, combine = "min", {"value": torch.inf}, torch.minimum


class Top(Total):
    """The k largest values of each cell and the ids of what had them.

    Attributes:
        values: [*at k *cell], falling, in float32; -inf where there were fewer.
        ids: [*at k *cell part]; -1 where there were fewer.
    """

    kind, nothing = "top", {"values": -torch.inf, "ids": -1}

    @classmethod
    def of(cls, values: Tensor, ids: Tensor, k: int) -> Self:
        """The top of some candidates: values [candidate *cell].

        Ids are [candidate] or [candidate part], or [candidate *cell part].
        """
        values = values.detach().float()
        ids = _parts(ids.to(values.device))
        if ids.ndim != values.ndim + 1:  # one for each candidate, and not for each of its cells
            ids = ids.view(len(ids), *(1,) * (values.ndim - 1), ids.shape[-1])
        parts = {"values": values, "ids": ids.expand(*values.shape, ids.shape[-1])}
        parts = cls._longer(parts, max(k, len(values)))
        return cls(_largest(parts["values"], parts["ids"], k, 0))

    @property
    def value(self) -> Self:
        """The total itself, for its values and ids."""
        return self

    @property
    def values(self) -> Tensor:
        """[*at k *cell]."""
        return self.parts["values"]

    @property
    def ids(self) -> Tensor:
        """[*at k *cell part]."""
        return self.parts["ids"]

    @classmethod
    def _join(cls, one: Tensors, two: Tensors, axis: int) -> Tensors:
        values, ids = (torch.cat([one[part], two[part]], axis) for part in ("values", "ids"))
        return _largest(values, ids, one["values"].shape[axis], axis)


class Keep(Total):
    """A sample of rows in which each has the same chance, however the data are dealt.

    A lot is drawn for each row from the seed and its id; the rows with the lowest lots stay.
    """

    kind, nothing = "keep", {"value": 0}

    @classmethod
    def of(cls, rows: Tensor, ids: Tensor, size: int, seed: int) -> Self:
        """What stays of some rows; ids [row *part] are theirs alone."""
        lots = _lots(_parts(ids.to(rows.device)), seed)
        return cls(_first(rows.detach(), lots, size))

    @property
    def shape(self) -> tuple[int, ...]:
        """How many rows may stay, and the shape of one."""
        return (int(self.parts["size"]), *self.value.shape[1:])

    @classmethod
    def _join(cls, one: Tensors, two: Tensors, axis: int) -> Tensors:
        rows, lots = (torch.cat([one[part], two[part]]) for part in ("value", "lots"))
        return _first(rows, lots, int(one["size"]))


KINDS: dict[str, type[Total]] = {one.kind: one for one in (Sum, Max, Min, Top, Keep)}


class Totals:
    """Totals by name, and what the pass that is running would add to them."""

    def __init__(self) -> None:
        self.named: dict[str, Any] = {}
        self.forget()

    def forget(self) -> None:
        """Add nothing of this pass."""
        self._pending: dict[str, dict[int | None, Any]] = {}
        self._ready: dict[str, Any] = {}

    def add(self, name: str, total: Any, at: int | None = None) -> None:
        """Hold something back until `fold`.

        Raises:
            ValueError: It is of another kind or shape than before, or `at` is below 0.
        """
        if at is not None and at < 0:
            raise ValueError(f"State {name!r} was given at={at}; places count from 0.")
        by_place = self._pending.setdefault(name, {})
        first = next(iter(by_place.values()), None)
        known = first or self.named.get(name)
        if known is not None:
            placed = None not in by_place if first else known.at
            _require_alike(name, (known, placed), (total, at is not None))
        by_place[at] = by_place[at].settled() + total.settled() if at in by_place else total

    def ready(self) -> dict[str, Any]:
        """What the pass has added, by name."""
        for name, by_place in self._pending.items():
            first = next(iter(by_place.values()))
            self._ready[name] = (first if None in by_place else first.stack(by_place)).settled()
        self._pending = {}
        return self._ready

    def fold(self) -> None:
        """Add what was held back."""
        for name, total in self.ready().items():
            self.merge(name, total)
        self.forget()

    def merge(self, name: str, total: Any) -> None:
        """Add to the total of a name.

        Raises:
            ValueError: It is of another kind or shape.
        """
        known = self.named.get(name)
        if known is not None:
            _require_alike(name, (known, known.at), (total, total.at))
        # On the newer one's device, so that what was read from a file moves there once.
        self.named[name] = total if known is None else total + known

    def state_dict(self) -> Tensors:
        """All totals as tensors; the numbers keep their order, which files do not."""
        return {
            f"{number:05}/{total.kind}/{'at' if total.at else ''}/{part}/{name}": tensor
            for number, (name, total) in enumerate(self.named.items())
            for part, tensor in total.parts.items()
        }

    @classmethod
    def from_state_dict(cls, state: Tensors) -> Totals:
        """The totals that `state_dict` gave."""
        totals = cls()
        for key in sorted(state):
            _, kind, at, part, name = key.split("/", 4)
            totals.named.setdefault(name, KINDS[kind]({}, bool(at))).parts[part] = state[key]
        return totals


def _parts(ids: Tensor) -> Tensor:
    """Ids of one part or of several, as of several; there may be none."""
    return (ids[:, None] if ids.ndim == 1 else ids).long()


def _require_alike(name: str, known: tuple[Total, bool], new: tuple[Total, bool]) -> None:
    before, now = ((total.kind, total.shape, at) for total, at in (known, new))
    if before != now:
        was, given = (
            f"{kind} of shape {tuple(shape)} {'with' if at else 'without'} at="
            for kind, shape, at in (before, now)
        )
        raise ValueError(
            f"State {name!r} was a {was}, and is given a {given}. A name has one kind and one "
            "shape in all passes: reduce over samples and positions first, or use another name."
        )


def _wide(tensor: Tensor) -> Tensor:
    """In float64 (where the device has it) or int64."""
    if not tensor.is_floating_point():
        return tensor.long()
    return tensor if tensor.device.type == "mps" else tensor.double()


def _largest(values: Tensor, ids: Tensor, k: int, axis: int) -> Tensors:
    """The k largest along an axis; which of equal ones is a matter of their ids alone."""
    bits = (values + 0.0).view(torch.int32)  # no minus zero
    rising = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).long()  # whole numbers that rise as the values do
    order = ((rising << 32) + (_lots(ids) & 0xFFFFFFFF)).topk(k, axis).indices
    wide_order = order[..., None].expand(*order.shape, ids.shape[-1])
    return {"values": values.gather(axis, order), "ids": ids.gather(axis, wide_order)}


def _first(rows: Tensor, lots: Tensor, size: int) -> Tensors:
    order = lots.argsort()[:size]
    return {"value": rows[order], "lots": lots[order], "size": torch.tensor(size)}


def _lots(ids: Tensor, seed: int = 0) -> Tensor:
    """A well mixed number for each id [... part], the same on every machine (as SplitMix64)."""
    lots = torch.zeros_like(ids[..., 0])
    parts: list[Any] = [seed, *ids.unbind(-1)]
    for part in parts:
        lots = (lots ^ part) - 7046029254386353131
        lots = (lots ^ (lots >> 30)) * -4658895280553007687
        lots = (lots ^ (lots >> 27)) * -7723592293110705685
        lots = lots ^ (lots >> 31)
    return lots

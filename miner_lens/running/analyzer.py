"""The base class of everything that reads hook points."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Sequence
from copy import copy
from functools import partial
from typing import Any, Generic, Protocol, Self, TypeVar

import torch
from torch import Tensor

from miner_lens.data.sample import SampleError
from miner_lens.models import sites
from miner_lens.models.access import identity, layout
from miner_lens.models.bridge import hf_model_of, pass_inputs, prepare
from miner_lens.models.identity import ModelIdentity
from miner_lens.models.points import Point
from miner_lens.running.batch import Batch, TowerPass
from miner_lens.running.totals import KINDS, Keep, Max, Min, Sum, Top, wide

Hook = tuple[str, Callable[..., Tensor | None]]
Running = Callable[[], Batch | None]
State = dict[str, Tensor]
R = TypeVar("R", covariant=True)

OUTSIDE = (
    "The {tower} tower ran outside of a forward pass of the whole model, as it does within "
    "generate, so its rows cannot be told apart by sample. Call the model on the prompt instead."
)


class Shared(Protocol, Hashable):
    """Something that several analyzers need of a pass, read by hooks of its own.

    Equal ones are hooked once in each pass; what they read they keep in `batch.once(self, ...)`.
    """

    def hooks(self, model: Any, running: Running) -> list[Hook]:
        """Its hooks; `running` gives the batch of the pass, or None in a step of generation."""
        ...


class Analyzer(ABC, Generic[R]):
    """Reads hook points during passes and folds what it sees into a small state.

    An analysis is a subclass with three methods: `points`, `see` and `result`. Batches, padding,
    checkpoints, several processes, merging (`a + b`), samples that are refused, and towers follow
    by themselves. In `see`, state is named and says how it merges: `self.sum`, `self.max`,
    `self.min`, `self.top`, `self.keep`; afterwards `self[name]` reads it. After `run` the analyzer
    holds its state.

    Args:
        site: Where it reads, if its points depend on that: `"llm"`, or a tower of the model.

    Attributes:
        needs_gradients: Whether `see` wants the gradient at each point as well; `run` refuses it
            for now.
        samples: How many samples it has seen.
        skipped: How many could not be used.
        identity: The model that it has seen.

    Example:
        class Sparsity(ml.Analyzer):
            def points(self, model):
                return ml.activation_points(model, self.site)

            def see(self, x, point, batch):
                for modality, mask in batch.masks.items():
                    positive = (x[mask] > 0).float().mean(-1).sum()
                    self.sum(f"{modality}.positive", positive, at=point.layer)
                    self.sum(f"{modality}.tokens", mask.sum(), at=point.layer)

            def result(self):
                return {m: self[f"{m}.positive"] / self[f"{m}.tokens"] for m in self.modalities}
    """

    needs_gradients = False
    site = "llm"

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Make its state, so that a subclass's `__init__` need not call this one's."""
        analyzer = super().__new__(cls)
        analyzer._forget()
        return analyzer

    def __init__(self, site: str = "llm") -> None:
        self.site = site

    @abstractmethod
    def points(self, model: Any) -> Sequence[Point]:
        """The hook points that `see` is called for, such as `ml.activation_points(model)`."""

    @abstractmethod
    def see(self, x: Tensor, point: Point, batch: Batch) -> None:
        """Fold what passes through a point in one pass.

        Args:
            x: [sample pos ...]; in a tower, each sample's rows, padded. A tower that is called
                once for images and once for videos is seen once for each.
            point: Which point it is.
            batch: What the pass is about; its masks are [sample pos], to match.
        """

    @abstractmethod
    def result(self) -> R:
        """What it amounts to."""

    # What `see` calls.

    def sum(self, name: str, value: Tensor | float, at: int | None = None) -> None:
        """Add to a sum, in float64, or in int64 for whole numbers.

        Args:
            name: Of the state.
            value: Of any shape, the same each time.
            at: A place on the first axis of the state, such as `point.layer`.
        """
        self._add(name, Sum(wide(value)), at)

    def max(self, name: str, value: Tensor | float, at: int | None = None) -> None:
        """Keep the larger of each element; see `sum`."""
        self._add(name, Max(torch.as_tensor(value).detach()), at)

    def min(self, name: str, value: Tensor | float, at: int | None = None) -> None:
        """Keep the smaller of each element; see `sum`."""
        self._add(name, Min(torch.as_tensor(value).detach()), at)

    def top(self, name: str, values: Tensor, ids: Tensor, k: int, at: int | None = None) -> None:
        """Keep the k largest values of each cell, with the ids of what had them.

        `self[name]` is a `Top` of `values` [k *cell] and `ids` [k *cell part].

        Args:
            name: Of the state.
            values: [candidate *cell], such as `x[mask]`, [token neuron].
            ids: Whole numbers for each candidate, [candidate] or [candidate part], such as
                `batch.places[mask]`.
            k: How many to keep.
            at: A place on the first axis of the state, such as `point.layer`.
        """
        self._add(name, Top.of(values, ids, k), at)

    def keep(
        self, name: str, rows: Tensor, at_most: int, seed: int = 0, ids: Tensor | None = None
    ) -> None:
        """Keep a random sample of rows, the same however the data are dealt to processes.

        `self[name]` is [row ...].

        Args:
            name: Of the state.
            rows: [row ...]: one for each sample of the batch, or with ids.
            at_most: How many to keep.
            seed: Of the draw.
            ids: Whole numbers that are each row's alone, [row] or [row part], such as
                `batch.places[mask]`; left out, rows are the batch's samples.

        Raises:
            ValueError: Rows without ids are not one for each sample.
        """
        if ids is None:
            ids = torch.tensor(self._batch.index)
            if len(ids) != len(rows):
                raise ValueError(
                    f"keep({name!r}) was given {len(rows)} rows for {len(ids)} samples and no ids. "
                    "Give ids that are each row's alone, such as batch.places[mask]."
                )
        self._add(name, Keep.of(rows, ids, at_most, seed), None)

    # What `result` reads.

    def __getitem__(self, name: str) -> Any:
        if name not in self._totals:
            known = ", ".join(self._totals) or "nothing yet"
            raise KeyError(f"There is no state {name!r}; there is {known}.")
        total = self._totals[name]
        if isinstance(total, Top):
            return total
        return total.rows if isinstance(total, Keep) else total.tensor

    def __contains__(self, name: str) -> bool:
        return name in self._totals

    @property
    def occurrences(self) -> dict[str, int]:
        """In how many samples each modality occurred that the data know of."""
        return {name: int(count) for name, count in self._occurrences.items()}

    @property
    def modalities(self) -> tuple[str, ...]:
        """The modalities that occurred in any sample."""
        return tuple(name for name, count in self.occurrences.items() if count)

    @property
    def labels(self) -> tuple[str, ...]:
        """The labels that occurred, in alphabetical order."""
        return tuple(sorted(self._labels))

    @property
    def settings(self) -> dict[str, Any]:
        """What two analyzers must share to be merged or continued: public plain attributes."""
        plain = (str, int, float, bool, list, tuple, type(None))
        counted = {"samples", "skipped"}
        return {"site": self.site} | {
            name: value
            for name, value in vars(self).items()
            if not name.startswith("_") and name not in counted and isinstance(value, plain)
        }

    def __add__(self, other: Self) -> Self:
        """A new analyzer that has seen what both have seen.

        Raises:
            ValueError: They have other settings, or have seen other models.
        """
        if type(other) is not type(self):
            return NotImplemented
        merged = copy(self)
        merged._copy_state()
        merged._merge(other)
        return merged

    # What `run` calls.

    def begin(self, model: Any) -> None:
        """Note the model that is about to run.

        Raises:
            ValueError: It is another one than before, or has no such site.
        """
        self._remember(identity(model, self.site))

    def needs(self) -> Sequence[Shared]:
        """What it wants read by hooks that are shared with other analyzers."""
        return ()

    def hooks(self, model: Any) -> list[Hook]:
        """Hooks for plain TransformerLens, `model.run_with_hooks(tokens, fwd_hooks=...)`.

        Each forward pass of a prompt is folded at its end; steps of generation are passed by.
        """
        prepare(model)
        self.begin(model)
        known, inputs = layout(model), pass_inputs(model)
        running: list[Batch] = []

        def begin(ids: Tensor, hook: Any) -> None:
            running.clear()
            if _continues(inputs.all):
                return
            real = torch.ones_like(ids, dtype=torch.bool) if inputs.real is None else inputs.real
            given = inputs.all | {"input_ids": ids, "attention_mask": real}
            index = tuple(range(self.samples, self.samples + len(ids)))
            names = tuple(map(str, range(len(ids))))
            running.append(Batch(given, known.masks(ids, real), names, index=index))
            self.open(running[0], hf_model_of(model))

        def end(residual: Tensor, hook: Any) -> None:
            if running:
                batch = running.pop()
                self.check(batch)
                self.accept(batch)

        inner = pass_hooks([self], model, lambda: running[0] if running else None)
        return [("embed.hook_in", begin), *inner, ("ln_final.hook_out", end)]

    def open(self, batch: Batch, hf_model: Any) -> None:
        """Make ready for a pass; what a pass before it has left unaccepted is forgotten.

        Raises:
            SampleError: The media do not fit the placeholders.
        """
        self._batch = batch
        if self.site != "llm":
            TowerPass.of(batch, hf_model, self.site)
        self._pending: dict[str, dict[int | None, Any]] = {}
        self._fired: dict[Point, int] = {}
        self._finite: list[tuple[Point, Tensor]] = []

    def check(self, batch: Batch) -> None:
        """Raise `SampleError` if what was seen must not be folded, naming layer and sample.

        All analyzers check before any accepts, so that they count the same samples.

        Raises:
            SampleError: An activation, or what was made of it, is NaN or infinite.
            RuntimeError: No point was passed, or a tower ran another number of times than thought.
        """
        self._check_calls(batch)
        if not self._finite:
            return
        # The layers of a model may lie on several devices; only the last step waits for them.
        device = self._finite[0][1].device
        flags = [flag.to(device) for _, flag in self._finite]
        made = [
            (name, total.tensor.isfinite().all().to(device))
            for name, by_place in self._pending.items()
            for total in by_place.values()
            if isinstance(total, Sum) and total.tensor.is_floating_point()
        ]
        whole = torch.stack([*(flag.all() for flag in flags), *(flag for _, flag in made)]).cpu()
        if bool(whole.all()):
            return
        first = int((~whole).nonzero()[0])
        if first < len(flags):
            point, row = self._finite[first][0], int((~flags[first]).nonzero()[0])
            where = f"layer {point.layer}"
            where += "" if point.site == "llm" else f" of site {point.site!r}"
            who, what = batch.ids[row], f"activations in {where}"
        else:
            name = made[first - len(flags)][0]
            who, what = ", ".join(batch.ids), f"{name!r} of {type(self).__name__}"
        raise SampleError(
            f"{who}: NaN or infinite {what}. Load the model in a wider dtype (float32 or bfloat16 "
            "rather than float16), or leave the sample out with on_error='skip'."
        )

    def accept(self, batch: Batch) -> None:
        """Fold what the pass has added."""
        for name, by_place in self._pending.items():
            first = next(iter(by_place.values()))
            total = first if None in by_place else type(first).stack(by_place)
            self._totals[name] = self._totals[name] + total if name in self._totals else total
        self._pending = {}
        self.samples += len(batch.ids)
        for name, count in self._present(batch).items():
            self._occurrences[name] = count + (
                self._occurrences[name].to(count.device) if name in self._occurrences else 0
            )
        self._labels |= {label for label in batch.labels if label is not None}

    def skip(self, samples: int) -> None:
        """Count samples that could not be used."""
        self.skipped += samples

    def state_dict(self) -> State:
        """Everything that was folded, as tensors that `load_state_dict` takes."""
        state = {"samples": torch.tensor(self.samples), "skipped": torch.tensor(self.skipped)}
        for number, (name, count) in enumerate(self._occurrences.items()):
            # The number keeps the order of modalities, which files do not.
            state[f"occurrences/{number:03}/{name}"] = count
        for label in self.labels:
            state[f"label/{label}"] = torch.tensor(True)
        for number, (name, total) in enumerate(self._totals.items()):
            for part, tensor in total.tensors().items():
                state[f"{total.kind}/{number:05}/{part}/{name}"] = tensor.clone()
        return state

    def load_state_dict(self, state: State) -> None:
        """Continue from what `state_dict` returned, forgetting what was seen before."""
        known = self.identity
        self._forget()
        self.identity = known
        self.samples, self.skipped = int(state["samples"]), int(state["skipped"])
        totals: dict[tuple[str, str, str], State] = {}
        for key in sorted(state):
            kind, _, rest = key.partition("/")
            if kind == "occurrences":
                self._occurrences[rest.partition("/")[2]] = state[key].clone()
            elif kind == "label":
                self._labels.add(rest)
            elif kind in KINDS:
                number, part, name = rest.split("/", 2)
                totals.setdefault((number, kind, name), {})[part] = state[key].clone()
        for (_, kind, name), parts in sorted(totals.items()):
            self._totals[name] = KINDS[kind].from_tensors(parts)

    def merge_state_dict(self, state: State) -> None:
        """Add what another analyzer of the same settings has seen."""
        other = copy(self)
        other.load_state_dict(state)
        self._merge(other)

    def hook(self, point: Point, hf_model: Any, running: Running, x: Tensor, hook: Any) -> None:
        """Hand what passes through a point to `see`; a hook function but for the first three."""
        batch = running()
        if point.site != "llm":
            if batch is None:
                raise RuntimeError(OUTSIDE.format(tower=point.site))
            tower = TowerPass.of(batch, hf_model, point.site)
            call = self._fired.get(point, 0)
            x, view = tower.padded(x, call)
        elif batch is None:
            return
        else:
            call, view = 0, batch
        self._fired[point] = call + 1
        with torch.no_grad():
            finite = batch.once((point.name, call), lambda: _finite(x))
            self._finite.append((point, finite))
            try:
                self.see(x.detach(), point, view)
            except ValueError as error:
                # A ValueError of the model's says that it refuses a sample; this is none.
                raise RuntimeError(
                    f"{type(self).__name__}.see failed at {point.name}: {error}"
                ) from error

    def _add(self, name: str, total: Any, at: int | None) -> None:
        by_place = self._pending.setdefault(name, {})
        if by_place and (at is None) != (None in by_place):
            raise ValueError(f"State {name!r} was given both with at= and without.")
        by_place[at] = by_place[at] + total if at in by_place else total

    def _check_calls(self, batch: Batch) -> None:
        if self.site == "llm":
            if not self._fired:
                raise RuntimeError(
                    f"{type(self).__name__} has seen none of its points in this pass; do the names "
                    "that points() gives exist in model.hook_dict?"
                )
            return
        calls, fired = len(batch.towers[self.site].calls), set(self._fired.values())
        if fired != ({calls} if calls else set()):
            raise RuntimeError(
                f"The {self.site} tower should have run {calls} times through each layer, but ran "
                f"{', '.join(map(str, sorted(fired))) or 0} times."
            )

    def _present(self, batch: Batch) -> dict[str, Tensor]:
        if self.site != "llm":
            return batch.towers[self.site].present()
        return batch.once("present", lambda: {n: m.any(1).sum() for n, m in batch.masks.items()})

    def _remember(self, model: ModelIdentity) -> None:
        if self.identity is not None:
            self.identity.check(model)
        self.identity = model

    def _merge(self, other: Self) -> None:
        if self.settings != other.settings:
            raise ValueError(
                f"Cannot merge {type(self).__name__} of {other.settings} with one of "
                f"{self.settings}: they do not measure the same."
            )
        if other.identity is not None:
            self._remember(other.identity)
        self.samples += other.samples
        self.skipped += other.skipped
        for name, count in other._occurrences.items():
            known = self._occurrences.get(name)
            self._occurrences[name] = count if known is None else known + count.to(known.device)
        self._labels |= other._labels
        for name, total in other._totals.items():
            self._totals[name] = self._totals[name] + total if name in self._totals else total

    def _forget(self) -> None:
        self.identity: ModelIdentity | None = None
        self.samples = self.skipped = 0
        self._totals: dict[str, Any] = {}
        self._occurrences: dict[str, Tensor] = {}
        self._labels: set[str] = set()

    def _copy_state(self) -> None:
        self._totals, self._labels = dict(self._totals), set(self._labels)
        self._occurrences = dict(self._occurrences)


def pass_hooks(analyzers: Sequence[Analyzer[Any]], model: Any, running: Running) -> list[Hook]:
    """All hooks of a pass; what several analyzers need is read once."""
    shared = dict.fromkeys(one for analyzer in analyzers for one in analyzer.needs())
    hooks = [hook for one in shared for hook in one.hooks(model, running)]
    hf_model = hf_model_of(model)
    for analyzer in analyzers:
        if analyzer.site != "llm":
            sites.find(hf_model, analyzer.site)
        for point in analyzer.points(model):
            hooks.append((point.name, partial(analyzer.hook, point, hf_model, running)))
    return hooks


def _finite(x: Tensor) -> Tensor:
    """Which samples have neither NaN nor infinity; a sum has one if any element is one."""
    return x.flatten(1).sum(1, dtype=torch.float32).isfinite()


def _continues(inputs: dict[str, Any]) -> bool:
    """Whether a pass continues an earlier one, as steps of generation do."""
    cache = inputs.get(
        "cache", inputs.get("past_key_values")
    )  # as of transformers 5.24, and before
    return cache is not None and cache.get_seq_length() > 0

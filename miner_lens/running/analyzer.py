"""The base class of everything that reads hook points."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from types import MappingProxyType
from typing import Any, Generic, Self, TypeVar

import torch
from torch import Tensor

from miner_lens.data.sample import SampleError
from miner_lens.data.signature import described
from miner_lens.models.access import identity
from miner_lens.models.forward import aside
from miner_lens.models.identity import ModelIdentity
from miner_lens.models.points import Point
from miner_lens.models.precision import full_precision
from miner_lens.running.batch import Batch, TowerPass
from miner_lens.running.hooks import Hook, Shared, prompt_hooks
from miner_lens.running.stateful import State, Stateful

R = TypeVar("R", covariant=True)


class Analyzer(Stateful, ABC, Generic[R]):
    """Reads hook points during passes and folds what it sees into a small state.

    An analysis is a subclass with three methods: `points`, `see` and `result`. Batches, padding,
    checkpoints, several processes, merging (`a + b`), samples that are refused, and towers follow
    by themselves. In `see`, state is named and says how it merges: `self.sum`, `self.max`,
    `self.min`, `self.top`, `self.keep`; afterwards `self[name]` reads it. After `run` the analyzer
    holds its state.

    The arguments that it is made with and its public attributes are its settings: analyzers that
    differ in them are not merged, nor is a run continued. Private attributes are no state: they
    are neither merged nor saved.

    Args:
        site: Where it reads, if its points depend on that: `"llm"`, or a tower of the model.

    Attributes:
        needs_gradients: Whether `see` wants the gradient of `run`'s objective at each point as
            well: it is called as `see(x, point, batch, gradient)`, from the last layer to the
            first.
        needs_logits: Whether `finish` wants the logits of all positions in `batch.output`.
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
    needs_logits = False
    site = "llm"
    identity: ModelIdentity | None = None
    _given: Mapping[str, Any] = MappingProxyType({})

    def __init_subclass__(cls, **options: Any) -> None:
        """Have what an author writes compute in full precision, also where the model does not."""
        super().__init_subclass__(**options)
        for name in ("see", "finish", "result"):
            if name in vars(cls):
                setattr(cls, name, full_precision()(vars(cls)[name]))

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Note what it is made with, so that a subclass's `__init__` need not call this one's."""
        self = super().__new__(cls)
        self._points = tuple[Point, ...]()
        try:
            given = inspect.signature(cls.__init__).bind(self, *args, **kwargs)
        except TypeError:  # which __init__ raises better; and a copy is made without arguments
            return self
        given.apply_defaults()
        self._given = {k: v for k, v in given.arguments.items() if v is not self}
        return self

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

    def finish(self, batch: Batch) -> None:
        """Fold what is known when a pass is over, such as `batch.output.logits`."""

    @abstractmethod
    def result(self) -> R:
        """What it amounts to."""

    @property
    def settings(self) -> dict[str, Any]:
        """What two analyzers must share to be merged or continued.

        By default the arguments that it was made with, and its public attributes.
        """
        public = {k: v for k, v in vars(self).items() if not k.startswith("_")}
        public.pop("identity", None)
        found: dict[str, Any] = described({"site": self.site, **self._given, **public})
        return found

    def __add__(self, other: Self) -> Self:
        """A new analyzer that has seen what both have seen.

        Raises:
            ValueError: They have other settings, or have seen other models.
        """
        if type(other) is not type(self):
            return NotImplemented
        merged = self._copied()
        merged._merge(other)
        return merged

    def __radd__(self, other: object) -> Self:
        """So that `sum` works, which begins with 0."""
        return self._copied() if isinstance(other, int) and other == 0 else NotImplemented

    def widened(self, of_neurons: Tensor, fill: float = 0) -> Tensor:
        """What belongs to a layer's neurons, [... neuron], for state that has all layers.

        Where layers have different numbers of neurons, narrow ones are filled up to the widest;
        elsewhere it is as it was. Give it what is about to be added: `x` itself is never wider than
        its layer.

        Args:
            of_neurons: Its last axis is the layer's neurons.
            fill: What stands where the layer has no neuron.
        """
        if self.identity is None or self.identity.widths is None:
            return of_neurons
        missing = self.identity.neurons - of_neurons.shape[-1]
        return torch.nn.functional.pad(of_neurons, (0, missing), value=fill)

    # What `run` calls.

    def begin(self, model: Any) -> None:
        """Note the model that is about to run, and the points to read in it.

        Raises:
            ValueError: It is another one than before, or has no such site or points.
        """
        name = type(self).__name__
        self._remember(identity(model, self.site))
        self._points = tuple(self.points(model))
        there = model.hook_dict  # gathered from all modules each time
        unknown = [point.name for point in self._points if point.name not in there]
        if unknown or not self._points:
            what = f"{unknown[0]!r}, which this model has not" if unknown else "no point"
            raise ValueError(f"{name}.points names {what}; model.hook_dict has all there are.")

    @property
    def reading(self) -> tuple[Point, ...]:
        """The points that it reads in the model that `begin` was given."""
        return self._points

    def needs(self) -> Sequence[Shared]:
        """What it wants read by hooks that are shared with other analyzers."""
        return ()

    def hooks(self, model: Any) -> list[Hook]:
        """Hooks for plain TransformerLens, `model.run_with_hooks(tokens, fwd_hooks=...)`.

        Each forward pass of a prompt is folded at its end; steps of generation are passed by.
        """
        return prompt_hooks(self, model)

    def open(self, batch: Batch, hf_model: Any) -> None:
        """Make ready for a pass; what a pass before it has left unaccepted is forgotten.

        Raises:
            SampleError: The media do not fit the placeholders.
        """
        for site in {self.site, *(point.site for point in self._points)} - {"llm"}:
            TowerPass.of(batch, hf_model, site)
        self.forget(batch.index)
        self._calls, self._seen = dict.fromkeys(self._points, 0), dict.fromkeys(self._points, 0)
        self._finite: list[tuple[Point, Tensor]] = []

    def receive(self, x: Tensor, point: Point, batch: Batch) -> None:
        """Hand what passes through a point to `see`, with its gradient as soon as there is one."""
        call, there = self._calls[point], x.detach()
        self._calls[point] += 1
        if point.site != "llm":
            batch.towers[point.site].view(call, there)  # while it is known what the call is told
        if not self.needs_gradients:
            self._hand_over((there,), point, call, batch)
        elif x.requires_grad:
            x.register_hook(  # type: ignore[no-untyped-call]
                lambda grad: self._hand_over((there, grad), point, call, batch)
            )

    def _hand_over(self, seen: Sequence[Tensor], point: Point, call: int, batch: Batch) -> None:
        view = batch
        if point.site != "llm":
            tower = batch.towers[point.site]
            (*_, view), seen = tower.padded(seen[0], call), [tower.padded(t, call)[0] for t in seen]
        with torch.no_grad():
            self._finite.append((point, batch.once((point.name, call), lambda: _finite(seen[0]))))
            self._finite += [(point, _finite(gradient)) for gradient in seen[1:]]
            self._seen[point] += 1
            with self._own(f"see failed at {point.name}"):
                see: Any = self.see
                see(seen[0], point, view, *seen[1:])

    def end(self, batch: Batch) -> None:
        """Hand over the finished pass to `finish`."""
        with torch.no_grad(), self._own("finish failed"):
            self.finish(batch)

    @contextmanager
    def _own(self, what: str) -> Iterator[None]:
        """The author's code is running: its calls are not the model's, nor are its errors."""
        try:
            with aside():
                yield
        except SampleError:
            raise
        except ValueError as error:
            # A ValueError of the model's says that it refuses a sample; this is none.
            raise RuntimeError(f"{type(self).__name__}.{what}: {error}") from error

    def check(self, batch: Batch) -> None:
        """Raise `SampleError` if what was seen must not be folded, naming layer and sample.

        All analyzers check before any accepts, so that they count the same samples.

        Raises:
            SampleError: An activation, or what was made of it, is NaN or infinite.
            RuntimeError: A point was passed another number of times than thought.
        """
        for point, calls in self._calls.items():
            thought = 1 if point.site == "llm" else len(batch.towers[point.site].modalities)
            if calls != thought:
                raise RuntimeError(
                    f"{point.name} should have run {thought} times in this pass, but ran {calls} "
                    f"times, so {type(self).__name__} has not seen what it reads."
                )
            if self._seen[point] != calls:
                raise RuntimeError(
                    f"No gradient of the objective has come to {point.name}, so "
                    f"{type(self).__name__} has not seen what it reads. Does the objective depend "
                    "on it?"
                )
        # Layers may lie on several devices; only the last step waits for them.
        made = {name: total.is_sound()[None] for name, total in self.added().items()}
        flags = [*(flag for _, flag in self._finite), *made.values()]
        if not flags or bool(torch.cat([flag.to(flags[0].device) for flag in flags]).all()):
            return
        for point, flag in self._finite:
            for name, fine in zip(batch.ids, flag.tolist(), strict=True):
                if not fine:
                    where = f"layer {point.layer} of site {point.site!r} ({point.name})"
                    raise SampleError(
                        f"{name}: NaN or infinite activations in {where}. Load the model in a "
                        "wider dtype (float32 or bfloat16 rather than float16), or leave the "
                        "sample out with on_error='skip'."
                    )
        bad = ", ".join(repr(name) for name, flag in made.items() if not flag)
        raise SampleError(
            f"{', '.join(batch.ids)}: {type(self).__name__}.see made NaN or infinity of finite "
            f"activations, in {bad}. A mean over no token is NaN, for one: sum, and divide in "
            "result; or leave the sample out with on_error='skip'."
        )

    def accept(self, batch: Batch) -> None:
        """Fold what the pass has added."""
        present = batch.present if self.site == "llm" else batch.towers[self.site].present
        self.fold(len(batch.ids), present, batch.labels)

    def merge_state_dict(self, state: State) -> None:
        """Add what another analyzer of the same settings has seen."""
        other = copy(self)
        other.load_state_dict(state)
        self._merge(other)

    def _copied(self) -> Self:
        copied = copy(self)
        copied.load_state_dict(self.state_dict())
        return copied

    def _merge(self, other: Self) -> None:
        if self.settings != other.settings:
            raise ValueError(
                f"Cannot merge {type(self).__name__} of {other.settings} with one of "
                f"{self.settings}: they do not measure the same."
            )
        if other.identity is not None:
            self._remember(other.identity)
        self.add_state(other)

    def _remember(self, model: ModelIdentity) -> None:
        if self.identity is not None:
            self.identity.check(model)
        self.identity = model


def _finite(x: Tensor) -> Tensor:
    """Which samples have neither NaN nor infinity; a sum has one if any element is one."""
    # float16 would overflow, and bfloat16 cast to float32 takes long on a CPU.
    dtype = torch.float32 if x.dtype == torch.float16 else x.dtype
    return x.flatten(1).sum(1, dtype=dtype).isfinite()

"""What a model makes of media before its decoder, kept for passes over the same media."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial, wraps
from typing import Any, NamedTuple

from miner_lens.models.copies import Growth, equal, grown, growth, repeat, single
from miner_lens.models.holders import held
from miner_lens.models.modality import media_tokens
from miner_lens.models.structure import decoder_of, plain

# What computes the features of a medium while they are kept: first the model itself, then the
# contexts that keep them.
_open: dict[tuple[Any, str], list[Callable[..., Any]]] = {}


class _Given(NamedTuple):
    """The arguments of a call, by place and by name."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def single(self, copies: int) -> _Given:
        """Those of one of so many copies."""
        if copies == 1:
            return self
        named = {name: single(one, copies) for name, one in self.kwargs.items()}
        return _Given(tuple(single(one, copies) for one in self.args), named)

    def times(self, copies: int, many: _Given) -> _Given:
        """Those of so many copies, of this one, where many copies have others."""

        def more(one: Any, other: Any) -> Any:
            return one if one is other else repeat(one, copies)

        args = tuple(map(more, self.args, many.args))
        return _Given(
            args, {name: more(self.kwargs[name], many.kwargs[name]) for name in many.kwargs}
        )


@dataclass
class Features:
    """The features of some media, computed once for all passes in which they are kept.

    That is right where these passes differ in nothing before the decoder: no tower neuron is off
    in one of them and on in another.

    Attributes:
        hf_model: The Hugging Face model.

    Example:
        features = Features(hf_model)
        for neurons in sets:  # of the decoder
            with ml.ablate(hf_model, neurons), features.kept():
                hf_model(**inputs)
    """

    hf_model: Any
    _calls: dict[tuple[int, str], list[tuple[_Given, Any]]] = field(default_factory=dict)
    _grows: dict[tuple[int, str], Growth | None] = field(default_factory=dict)

    @contextmanager
    def kept(self, copies: int = 1) -> Iterator[None]:
        """A context in which what was computed for equal inputs in another is taken from there.

        Args:
            copies: How many times over, one after another, the batch holds the same samples. These
                are computed once, where the result of several copies is that of one repeated.
        """
        with ExitStack() as stack:
            for place, method in self._places:
                stack.enter_context(self._keep(place, method, copies))
            yield

    def forget(self) -> None:
        """Let go of what was computed: other samples come."""
        self._calls.clear()

    @cached_property
    def _places(self) -> list[tuple[Any, str]]:
        modalities = media_tokens(self.hf_model.config)
        return [one for modality in modalities for one in _computing(self.hf_model, modality)]

    @contextmanager
    def _keep(self, place: Any, method: str, copies: int) -> Iterator[None]:
        compute = _open[place, method][0] if (place, method) in _open else getattr(place, method)
        key = (id(place), method)
        calls = self._calls.setdefault(key, [])

        def once(given: _Given) -> Any:
            for known, result in calls:
                if equal(known, given):
                    return result
            result = compute(*given.args, **given.kwargs)
            calls.append((given, result))
            return result

        @wraps(compute)
        def kept(*args: Any, **kwargs: Any) -> Any:
            given = _Given(args, kwargs)
            one = given.single(copies)
            if equal(one, given) or self._grows.get(key, "same") is None:
                return once(given)
            result = once(one)
            if key not in self._grows:
                two = one.times(2, given)
                self._grows[key] = growth(result, compute(*two.args, **two.kwargs))
            grows = self._grows[key]
            return once(given) if grows is None else grown(result, grows, copies)

        with held(("features", place, method), partial(_replaced, place, method)):
            _open[place, method].append(kept)
            try:
                yield
            finally:
                _open[place, method].remove(kept)


@contextmanager
def _replaced(place: Any, method: str) -> Iterator[None]:
    """Have what computes features ask the last context that is open, in whatever order they end."""
    compute, own = getattr(place, method), vars(place).get(method)
    functions = _open[place, method] = [compute]

    @wraps(compute)
    def last(*args: Any, **kwargs: Any) -> Any:
        return functions[-1](*args, **kwargs)

    setattr(place, method, last)
    try:
        yield
    finally:
        del _open[place, method]
        delattr(place, method) if own is None else setattr(place, method, own)


def _computing(hf_model: Any, modality: str) -> Iterator[tuple[Any, str]]:
    """Where the features of a medium are computed: by which method of what."""
    method = f"get_{modality}_features"
    # Outer modules hand the call on to the innermost.
    holders = [module for module in hf_model.modules() if hasattr(type(module), method)]
    if holders:
        yield holders[-1], method
        return
    # A model without an encoder of the medium returns itself, or its inner model.
    encoder, decoder = plain(hf_model.get_encoder(modality=modality)), decoder_of(hf_model)
    if all(module is not decoder for module in encoder.modules()):
        yield encoder, "forward"

"""What a model makes of media before its decoder, kept for passes over the same media."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from miner_lens.models.modality import media_tokens
from miner_lens.models.structure import decoder_of, plain

# Arguments of a call, by place and by name, and what came of it.
_Call = tuple[tuple[Any, ...], dict[str, Any], Any]


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
    _calls: dict[tuple[int, str], list[_Call]] = field(default_factory=dict)

    @contextmanager
    def kept(self) -> Iterator[None]:
        """A context in which what was computed for equal inputs in another is taken from there."""
        with ExitStack() as stack:
            for modality in media_tokens(self.hf_model.config):
                for place, method in _computing(self.hf_model, modality):
                    stack.enter_context(self._keep(place, method))
            yield

    @contextmanager
    def _keep(self, place: Any, method: str) -> Iterator[None]:
        compute, own = getattr(place, method), vars(place).get(method)
        calls = self._calls.setdefault((id(place), method), [])

        @wraps(compute)
        def kept(*args: Any, **kwargs: Any) -> Any:
            for known, named, result in calls:
                if equal(known, args) and equal(named, kwargs):
                    return result
            result = compute(*args, **kwargs)
            calls.append((args, kwargs, result))
            return result

        setattr(place, method, kept)
        try:
            yield
        finally:
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


def equal(one: Any, other: Any) -> bool:
    """Whether arguments are the same, tensors element by element."""
    if one is other:
        return True
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        alike = isinstance(one, Tensor) and isinstance(other, Tensor) and one.dtype == other.dtype
        return alike and one.device == other.device and torch.equal(one, other)
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(equal(one[name], other[name]) for name in one)
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(equal, one, other))
    return bool(one == other)

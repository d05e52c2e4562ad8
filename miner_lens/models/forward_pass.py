"""What a forward pass was given: its token ids, and which of its tokens are real."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from miner_lens.models.structure import plain

# What an additive mask adds where nothing is attended to is this or less; biases are more.
MASKED = -9e3

UNKNOWN = (
    "Which tokens of this pass are padding cannot be told: {why}. Call the model with "
    "attention_mask as [batch pos], 1 for each real token, the past included."
)


def past_length(inputs: Mapping[str, Any]) -> int:
    """How many tokens of the sequence went before this pass, by its cache."""
    return int(_past(inputs) or 0)


def cache_of(inputs: Mapping[str, Any]) -> Any:
    """Return the cache of keys and values that a pass was given, or None."""
    # The second is its name before transformers 5.24.
    return inputs.get("cache", inputs.get("past_key_values"))


def _past(inputs: Mapping[str, Any]) -> int | Tensor | None:
    cache = cache_of(inputs)
    try:
        return cache.get_seq_length() if hasattr(cache, "get_seq_length") else None
    except ValueError:  # it is of linear attention alone, which does not count
        return None


@dataclass(frozen=True)
class Call:
    """A call of the model, or of a module in it that has the decoder in it.

    Attributes:
        arguments: What it was given, by name.
        past: How many tokens its cache had; None without a cache.
    """

    arguments: dict[str, Any]
    past: int | Tensor | None

    @classmethod
    def of(cls, module: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Call:
        """The call that a forward pre-hook sees."""
        names = _names(type(plain(module)).forward)
        given = dict(zip(names, args, strict=False)) | dict(kwargs)
        arguments = {name: given[name] for name in names if name in given} | given
        past = _past(arguments)
        # A static cache counts on in place.
        return cls(arguments, past.clone() if isinstance(past, Tensor) else past)


@cache
def _names(forward: Callable[..., Any]) -> tuple[str, ...]:
    """The names of what a kind of module takes by position."""
    parameters = list(inspect.signature(forward).parameters.values())[1:]
    return tuple(p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD)


class ForwardPass:
    """A forward pass that is running.

    Nothing of an earlier pass is known here, whatever tensors it shares with this one.

    Attributes:
        calls: Those that have begun: of the model, of the modules in it that have its decoder in
            them, and of the decoder, as far as they are called.
        grad: Whether gradients were wanted when it began.
    """

    def __init__(self) -> None:
        self.grad = torch.is_grad_enabled()
        self.calls: list[Call] = []
        self._made: dict[Hashable, Any] = {}

    def once(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """Something that is made once in this pass."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    @property
    def ids(self) -> Tensor | None:
        """The token ids, as the outermost call has them; None where there are embeddings alone."""
        return next(
            (ids for call in self.calls if (ids := _tensor(call, "input_ids")) is not None), None
        )

    @property
    def shape(self) -> torch.Size:
        """How many samples and positions the decoder is given.

        Raises:
            ValueError: It is given neither ids nor embeddings by these names.
        """
        for call in reversed(self.calls):
            for name in ("inputs_embeds", "input_ids"):
                if (tensor := _tensor(call, name)) is not None:
                    return tensor.shape[:2]
        raise ValueError(UNKNOWN.format(why="it has neither input_ids nor inputs_embeds"))

    @property
    def real(self) -> Bool[Tensor, "batch pos"] | None:
        """Which tokens are no padding; None where no mask is, so that all are real.

        Raises:
            ValueError: That cannot be told.
        """
        made: Tensor | None = self.once(("real", len(self.calls)), self._real)
        return made

    @property
    def packed(self) -> bool:
        """Whether rows hold several samples, as transformers finds out where there is no mask."""
        made: bool = self.once("packed", self._packed)
        return made

    def _real(self) -> Tensor | None:
        masks = list(self._masks())
        if not masks:
            return None
        by_token = [(call, mask) for call, mask in masks if _ndim(mask) == 2]
        by_pair = [(call, mask) for call, mask in masks if _ndim(mask) == 4]
        if by_token:
            call, mask = by_token[0]
            real = self._window(call, mask)
        elif by_pair:
            # The widest sees most; narrower ones are of layers that look back less far.
            call, mask = max(by_pair, key=lambda pair: int(pair[1].shape[-1]))
            real = self._attended(call, mask, call.arguments["attention_mask"] is mask)
        else:
            kinds = ", ".join(sorted({_kind(mask) for _, mask in masks}))
            raise ValueError(UNKNOWN.format(why=f"its attention_mask is {kinds}"))
        return real.expand(self.shape)

    def _masks(self) -> Iterator[tuple[Call, Any]]:
        """All attention masks, the outermost call's first."""
        for call in self.calls:
            mask = call.arguments.get("attention_mask")
            # By kind of attention, as with a static cache.
            masks = mask.values() if isinstance(mask, Mapping) else [mask]
            yield from ((call, one) for one in masks if one is not None)

    def _packed(self) -> bool:
        for call in self.calls:
            positions = _tensor(call, "position_ids")
            if call.past is None and positions is not None and positions.ndim == 2:
                return bool((positions.diff(dim=-1) != 1).any())
        return False

    def _first(self, call: Call, length: int) -> int:
        """Where this pass begins in a mask of that length, which has the past before it."""
        pos = self.shape[1]
        if call.past is None or length == pos:
            return length - pos
        # A static cache has room behind, and a sliding window has forgotten the beginning.
        past = int(call.past)
        return past if length > past + pos else length - pos

    def _window(self, call: Call, mask: Tensor) -> Tensor:
        first, pos = self._first(call, mask.shape[1]), self.shape[1]
        if first < 0 or (call.past is not None and mask.shape[1] < int(call.past) + pos):
            raise ValueError(
                UNKNOWN.format(
                    why=f"its attention_mask is {list(mask.shape)}, and with the past of "
                    f"{int(call.past or 0)} it has {int(call.past or 0) + pos} tokens"
                )
            )
        return mask[:, first : first + pos] != 0

    def _attended(self, call: Call, mask: Tensor, handmade: bool) -> Tensor:
        """Which tokens some token attends to, which of padding none does."""
        pos = self.shape[1]
        first = self._first(call, mask.shape[-1])
        if first < 0 or mask.shape[-2] not in (1, pos):
            raise ValueError(UNKNOWN.format(why=f"its attention_mask is {list(mask.shape)}"))
        own = mask[..., first : first + pos]
        own = (own if own.dtype == torch.bool else own > MASKED).any(1)
        real = own.any(1)
        if handmade and own.shape[1] == pos > 1:
            others = own & ~torch.eye(pos, dtype=torch.bool, device=own.device)
            # Nobody attends to the last token, and to any other of padding that attends to itself.
            unseen = (real & ~others.any(1)).sum(1) > 1
            ahead = others.triu() & ~others.mT
            if bool(unseen.any() | ahead.any()):
                raise ValueError(
                    UNKNOWN.format(
                        why="its attention_mask of four dimensions has several tokens to which "
                        "they alone attend, or that attend to later ones which do not attend back"
                    )
                )
        return real


def _tensor(call: Call, name: str) -> Tensor | None:
    value = call.arguments.get(name)
    return value if isinstance(value, Tensor) else None


def _ndim(mask: Any) -> int:
    return mask.ndim if isinstance(mask, Tensor) else 0


def _kind(mask: Any) -> str:
    return f"{list(mask.shape)}" if isinstance(mask, Tensor) else f"a {type(mask).__name__}"

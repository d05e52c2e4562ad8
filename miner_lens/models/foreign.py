"""Hooks that others have put onto a model, which change what it computes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain
from typing import Any

from torch.nn.modules import module as torch_module

from miner_lens.data.signature import described
from miner_lens.installed import OURS, UPSTREAM
from miner_lens.models.inside import hf_model_of

KINDS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")

UNTOLD = (
    "A checkpoint is of one experiment, and it could not tell {what} from another: {why}. Give a "
    "function that reads numbers, texts and tensors only, passed by functools.partial, as default "
    "arguments or in a closure; or set its attribute `description` to what tells it apart; or take "
    "it off; or leave out checkpoint."
)


def foreign_hooks(model: Any, fully: bool) -> list[Any]:
    """Describe TransformerLens's and torch's hooks on a model and its towers, as JSON can hold it.

    Args:
        model: The model.
        fully: Refuse hooks that look like others.

    Raises:
        ValueError: There is such a hook.
    """
    return [
        [place, kind, identified(function, f"the hook on {place or 'the model'}", fully)]
        for place, kind, function in _hooks(model)
    ]


def identified(function: Callable[..., Any], what: str, fully: bool) -> Any:
    """Describe a function, or what it says of itself.

    Args:
        function: The function.
        what: The name of it for the error.
        fully: Refuse one that looks like others.

    Raises:
        ValueError: It does.
    """
    try:
        return getattr(function, "description", None) or described(function, fully)
    except ValueError as error:
        raise ValueError(UNTOLD.format(what=what, why=error)) from error


def _hooks(model: Any) -> Iterator[tuple[str, str, Callable[..., Any]]]:
    parts = chain(model.named_modules(), hf_model_of(model).named_modules())
    for place, part in {id(part): (place, part) for place, part in parts}.values():
        own = set()
        for handle in chain(getattr(part, "fwd_hooks", ()), getattr(part, "bwd_hooks", ())):
            own.add(handle.hook.id)
            if not _is_of(handle.user_hook, OURS):
                yield part.name, "hook point", handle.user_hook
        for kind in KINDS:
            for number, function in getattr(part, kind).items():
                if number not in own and not _is_of(function, OURS + UPSTREAM):
                    yield place, kind, function
    for kind in KINDS:
        for function in getattr(torch_module, f"_global{kind}").values():
            if not _is_of(function, OURS + UPSTREAM):
                yield "all modules", kind, function


def _is_of(function: Any, packages: tuple[str, ...]) -> bool:
    if isinstance(function, partial):
        return _is_of(function.func, packages)
    named = function if hasattr(function, "__qualname__") else type(function)
    is_theirs = str(named.__module__).partition(".")[0] in packages
    return is_theirs and not hasattr(function, "description")

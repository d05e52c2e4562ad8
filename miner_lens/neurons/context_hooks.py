"""Hooks that last as long as a context, and that notice when they did nothing."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import nn

from miner_lens.models.checkpointing import applies, checkpointed
from miner_lens.models.forward_pass import ForwardPass
from miner_lens.models.holders import held
from miner_lens.models.hook import ContextHook, do_nothing
from miner_lens.models.pass_inputs import PassInputs


class ContextHooks:
    """The hooks by which a context writes into a model.

    Args:
        hf_model: The model.
        beside: What must be open beside them, so that they are called.
    """

    def __init__(
        self, hf_model: Any, beside: Sequence[Callable[[], AbstractContextManager[Any]]] = ()
    ) -> None:
        self._hf_model, self._beside = hf_model, beside
        self._written: list[tuple[nn.Module, ContextHook, Any]] = []
        self._runs: list[tuple[ContextHook, Any]] = []
        self._inputs: list[PassInputs] = []

    @contextmanager
    def open(self) -> Iterator[None]:
        """The context, in which hooks are added; it ends with them."""
        with ExitStack() as stack:
            for need in self._beside:
                stack.enter_context(need())
            stack.enter_context(checkpointed(self._hf_model, self))
            stack.callback(self._remove)
            yield

    def write(self, module: nn.Module, function: Callable[..., Any]) -> ContextHook:
        """Have a function write into what a module returns."""
        hook = ContextHook(function, partial(applies, self._hf_model, self))
        self._written.append((module, hook, module.register_forward_hook(hook)))
        return hook

    def know(self, inputs: PassInputs) -> None:
        """Stop with the context what sees the passes' inputs."""
        self._inputs.append(inputs)

    def watch(self, modules: Iterable[nn.Module]) -> None:
        """Know whether any of these modules was run to its end: a pass may stop before it."""
        for module in modules:
            hook = ContextHook(do_nothing)
            self._runs.append((hook, module.register_forward_hook(hook)))

    def _remove(self) -> None:
        for _, _, handle in self._written:
            handle.remove()
        for _, handle in self._runs:
            handle.remove()
        for inputs in self._inputs:
            inputs.stop()

    def kept(self) -> Callable[[], AbstractContextManager[None]]:
        """A context in which a part of the pass that is running can be computed again."""
        return partial(self._again, [(inputs, inputs.running) for inputs in self._inputs])

    @contextmanager
    def _again(self, known: Sequence[tuple[PassInputs, ForwardPass | None]]) -> Iterator[None]:
        with ExitStack() as stack:
            for need in self._beside:
                stack.enter_context(need())
            for inputs, running in known:
                stack.enter_context(inputs.again(running))
            stack.enter_context(held(("hooks", self), self._put_back))
            yield

    @contextmanager
    def _put_back(self) -> Iterator[None]:
        """The hooks where they were, among those that others have registered."""
        removed = [one for one in self._written if one[2].id not in one[0]._forward_hooks]
        for module, hook, handle in removed:
            hooks: Any = module._forward_hooks  # ordered
            later = [key for key in hooks if key > handle.id]
            hooks[handle.id] = hook
            for key in later:
                hooks.move_to_end(key)
        try:
            yield
        finally:
            for _, _, handle in removed:
                handle.remove()

    def warn_if_idle(self, compiled: Callable[[], bool], stacklevel: int) -> None:
        """Warn where the model may have run as if there were no hooks.

        Args:
            compiled: Whether the model has compiled code, whose runs may go unseen.
            stacklevel: Of the warning, as `warnings.warn` counts in the caller.
        """
        wrote = any(hook.called for _, hook, _ in self._written)
        ran = any(hook.called for hook, _ in self._runs)
        if any(handle.id not in module._forward_hooks for module, _, handle in self._written):
            message = (
                "Hooks of this ablation were removed while it was open, as some tools do when they "
                "clean up. "
                + ("Passes after that were not ablated" if wrote else "Nothing was ablated")
                + ". Open ml.ablate after such a tool has cleaned up, or ml.bake the neurons."
            )
        elif not self._written or wrote:
            return
        elif ran:
            message = (
                "The model ran inside this ablation, but nothing was written: the activation "
                "functions of its MLPs were not called. Compiled code and fused kernels pass them "
                "by; run the model uncompiled and unfused, or ml.bake the neurons."
            )
        elif compiled():
            message = (
                "Nothing was written inside this ablation: the model did not run, or its compiled "
                "code passed hooks by, as it does where torch.compiler.set_stance has another "
                "stance inside ml.ablate."
            )
        else:
            return
        warnings.warn(message, stacklevel=stacklevel + 1)

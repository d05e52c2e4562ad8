"""Hooks that last as long as a context, and that notice when they did nothing."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from miner_lens.models.hook import ContextHook, do_nothing


class ContextHooks:
    """The hooks by which a context writes into a model."""

    def __init__(self) -> None:
        self._written: list[tuple[nn.Module, ContextHook, Any]] = []
        self._runs: list[tuple[ContextHook, Any]] = []

    def write(self, module: nn.Module, function: Callable[..., Any]) -> ContextHook:
        """Have a function write into what a module returns."""
        hook = ContextHook(function)
        self._written.append((module, hook, module.register_forward_hook(hook)))
        return hook

    def watch(self, modules: Iterable[nn.Module]) -> None:
        """Know whether any of these modules was run to its end: a pass may stop before it."""
        for module in modules:
            hook = ContextHook(do_nothing)
            self._runs.append((hook, module.register_forward_hook(hook)))

    def remove(self) -> None:
        """End it."""
        for _, _, handle in self._written:
            handle.remove()
        for _, handle in self._runs:
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

"""The inputs of the forward pass that is running, as hooks see them."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn

from miner_lens.models.collate import brings_media
from miner_lens.models.forward_pass import Call, ForwardPass, past_length
from miner_lens.models.inside import hf_model_of
from miner_lens.models.modality import media_tokens
from miner_lens.models.structure import decoder_of, way_to_decoder

# The argument by which a model is told of how many positions logits are wanted.
KEEP = "logits_to_keep"
# How many passes without media are looked at for placeholders, where that waits for a device.
LOOKS = 8
BLANKS = (
    "These tokens have placeholders of media, but this pass brings no media, so the model reads "
    "the placeholders themselves. Pass all inputs, model(**ml.inputs(model, messages)), or open "
    "ml.bind(model, inputs) around tools that pass tokens alone."
)


class PassInputs:
    """The inputs of the forward pass that is running, its token ids and its padding mask.

    A pass begins where the model is called, or a module in it that has its decoder in it.

    Args:
        of_bridge: It sees all passes of a bridge, and not those in a context alone.
    """

    def __init__(self, of_bridge: bool = False) -> None:
        self.of_bridge, self._looks = of_bridge, LOOKS
        self.handles: list[Any] = []
        # By thread, with the modules that are being called.
        self._running: dict[int, tuple[ForwardPass, list[Any]]] = {}

    def __getstate__(self) -> dict[str, Any]:
        # No pass of a copy is running.
        return vars(self) | {"_running": {}}

    @property
    def running(self) -> ForwardPass | None:
        """The pass, or None where none is running."""
        return self._running.get(get_ident(), (None,))[0]

    @property
    def ids(self) -> Tensor | None:
        """The token ids; None where there are none."""
        return None if self.running is None else self.running.ids

    @property
    def real(self) -> Tensor | None:
        """Which tokens are no padding; None where all are real. See `ForwardPass.real`."""
        return None if self.running is None else self.running.real

    @property
    def all(self) -> dict[str, Any]:
        """What the outermost call was given, by name."""
        running = self.running
        return {} if running is None else running.calls[0].arguments | {"input_ids": running.ids}

    def watch(self, model: Any, way: Sequence[nn.Module] = ()) -> None:
        """See each forward pass of a model from now on.

        Args:
            model: The model.
            way: Its `way_to_decoder`, where that has been looked up.
        """
        for module in way or way_to_decoder(hf_model_of(model)):
            self.watch_calls(module)
            self.handles.append(module.register_forward_hook(self.forget, always_call=True))
        decoder = decoder_of(hf_model_of(model))
        if KEEP in inspect.signature(decoder.forward).parameters:
            self.handles.append(decoder.register_forward_pre_hook(_keep_all, with_kwargs=True))

    def watch_calls(self, module: nn.Module) -> None:
        """See each call of a module from now on, and take it for running until the next one."""
        self.handles.append(module.register_forward_pre_hook(self.see, with_kwargs=True))

    def stop(self) -> None:
        """See no more passes."""
        while self.handles:
            self.handles.pop().remove()

    def see(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A forward pre-hook of a module that has the decoder in it, or of the decoder."""
        state = self._running.get(get_ident())
        # One that is called already was interrupted, and so is the pass.
        if state is None or any(called is module for called in state[1]):
            self._running[get_ident()] = state = (ForwardPass(), [])
        running, called = state
        running.calls.append(Call.of(module, args, kwargs))
        called.append(module)
        if self.of_bridge and len(running.calls) == 1:
            self._warn_of_blanks(module, running)

    def _warn_of_blanks(self, model: Any, running: ForwardPass) -> None:
        """Warn once that there are placeholders of media without media for them."""
        ids, arguments = running.ids, running.calls[0].arguments
        if ids is None or not self._looks or torch.compiler.is_compiling():
            return
        media = media_tokens(model.config)
        if not media or brings_media(arguments) or past_length(arguments):
            return
        self._looks -= ids.device.type != "cpu"
        if torch.isin(ids, ids.new_tensor(list(media.values()))).any():
            self._looks = 0
            warnings.warn(BLANKS, stacklevel=2)

    def forget(self, module: Any, *_: Any) -> None:
        """A forward hook of such a module: what was seen is of no later pass."""
        called = self._running.get(get_ident(), (None, []))[1]
        while any(one is module for one in called):
            called.pop()
        if not called:
            self._running.pop(get_ident(), None)

    @contextmanager
    def again(self, running: ForwardPass | None) -> Iterator[None]:
        """A pass that is over is running once more, as a part of it is computed again."""
        former = self._running.pop(get_ident(), None)
        if running is not None:
            self._running[get_ident()] = (running, [])
        try:
            yield
        finally:
            self._running.pop(get_ident(), None)
            if former is not None:
                self._running[get_ident()] = former


def pass_inputs(bridge: Any) -> PassInputs:
    """The inputs of the forward pass that a bridge is running; `prepare` has it watched."""
    (seen,) = watching(hf_model_of(bridge))
    return seen


def watching(hf_model: Any) -> list[PassInputs]:
    """What sees all passes of a bridge's model: one, or none where no bridge is prepared."""
    # Found by its hooks, which a deep copy of the model has copies of.
    owners = (getattr(hook, "__self__", None) for hook in hf_model._forward_pre_hooks.values())
    return [owner for owner in owners if isinstance(owner, PassInputs) and owner.of_bridge]


def _keep_all(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A forward pre-hook of a decoder that would compute its last layers at few positions.

    Those are the ones whose logits are wanted; the model's head is shown no more than them anyhow.
    """
    return args, {name: value for name, value in kwargs.items() if name != KEEP}

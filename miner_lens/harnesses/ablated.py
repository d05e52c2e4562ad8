"""A harness's own model class, with neurons switched off while it answers."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from miner_lens.models.inside import hf_model_of
from miner_lens.neurons.ablation import Neurons, ablate, check_neurons
from miner_lens.neurons.neuron_set import NeuronSet
from miner_lens.neurons.writing import Value


def ablated(base: type, methods: Iterable[str]) -> type:
    """A subclass of a harness's model class that takes `neurons`, `value` and `at` as well.

    The three are what `ml.ablate` takes; on a command line `neurons` is a file that
    `NeuronSet.save` wrote, or a folder or hub repository of `save_pretrained`.

    Args:
        base: The class; its `model` is a Hugging Face model.
        methods: By which the harness asks it. Those that it has run under the ablation.

    Raises:
        ValueError: When a model is made of it: the neurons are another model's.
    """

    def init(
        self: Any,
        *args: Any,
        neurons: Neurons | str,
        value: Value | str = "zero",
        at: str | None = None,
        **options: Any,
    ) -> None:
        base.__init__(self, *args, **options)  # type: ignore[misc]
        chosen = check_neurons(self.model, _read(neurons))
        self.ablation = {"neurons": chosen, "value": _number(value), "at": at}
        hf_model, processor = hf_model_of(self.model), getattr(self, "processor", None)
        if vars(hf_model).get("tokenizer") is None:
            # By which the model's delimiters are known, where `at` tells them from text.
            hf_model.tokenizer = getattr(processor, "tokenizer", getattr(self, "tokenizer", None))

    def under(method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def run(self: Any, *args: Any, **options: Any) -> Any:
            with ablate(self.model, **self.ablation):
                return method(self, *args, **options)

        return run

    own = {name: under(getattr(base, name)) for name in methods if hasattr(base, name)}
    return type(f"Ablated{base.__name__}", (base,), {"__init__": init, **own})


def _read(neurons: Neurons | str) -> Neurons:
    if not isinstance(neurons, str):
        return neurons
    if Path(neurons).is_file():
        return NeuronSet.load(neurons)
    return NeuronSet.from_pretrained(neurons)


def _number(value: Any) -> Any:
    """A value as the command line gives it."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return value

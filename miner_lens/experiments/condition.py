"""What is switched off in a trial."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from miner_lens.neurons.ablation import Neurons, PreparedAblation, opened
from miner_lens.neurons.writing import Value


@dataclass(frozen=True)
class Condition:
    """What is switched off in a trial.

    Attributes:
        name: What tables call it.
        neurons: The neurons to switch off, or what `select` returns; None: the model is intact.
        value: What is written into them, as for `ablate`.
        at: At the tokens of which modality only, as for `ablate`.
        complement: Whether to switch off every neuron but these, as for `ablate`.

    Raises:
        ValueError: It says how to ablate, but no neurons.

    Example:
        >>> Condition("intact")
        Condition(name='intact', neurons=None, value='zero', at=None, complement=False)
    """

    name: str
    neurons: Neurons | None = None
    value: Value = "zero"
    at: str | None = None
    complement: bool = False

    def __post_init__(self) -> None:
        if self.neurons is None and (self.value, self.at, self.complement) != ("zero", None, False):
            raise ValueError(
                f"Condition {self.name!r} says how to ablate, but not which neurons. Give neurons, "
                "or leave value, at and complement out for the intact model."
            )

    def prepared(self, model: Any) -> list[PreparedAblation]:
        """The ablations that it comes to, to be opened as often as wanted.

        Raises:
            ValueError: As `ablate`.
        """
        if self.neurons is None:
            return []
        return [PreparedAblation(model, self.neurons, self.value, self.at, self.complement)]

    def applied(self, model: Any) -> AbstractContextManager[None]:
        """A context in which the model is under this condition.

        Raises:
            ValueError: As `ablate`.
        """
        return opened(model, self.prepared(model))

"""The trials of some samples, as a process makes, writes and merges them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from miner_lens.experiments.table import Trials
from miner_lens.models.identity import ModelIdentity
from miner_lens.running.stateful import State


@dataclass(frozen=True)
class SampleTrials:
    """One sample under all conditions, in their order.

    Attributes:
        name: The sample's id.
        label: Its label.
        correct: Of each condition, from 0 to 1.
        logprob: Of each condition, in nats.
        answers: Of each condition, where answers are generated.
    """

    name: str
    label: str | None
    correct: Sequence[float]
    logprob: Sequence[float]
    answers: Sequence[str] = ()


class Scored:
    """Trials by the number of their sample in the data; the same however the data are dealt."""

    def __init__(self) -> None:
        self._rows: dict[int, SampleTrials] = {}

    def add(self, number: int, row: SampleTrials) -> None:
        """Add a sample's trials."""
        self._rows[number] = row

    def state_dict(self) -> State:
        """Everything that was added, as tensors that `load_state_dict` takes."""
        rows = [self._rows[number] for number in sorted(self._rows)]
        words = json.dumps([[row.name, row.label, list(row.answers)] for row in rows]).encode()
        return {
            "number": torch.tensor(sorted(self._rows), dtype=torch.long),
            "correct": torch.tensor([row.correct for row in rows], dtype=torch.float64),
            "logprob": torch.tensor([row.logprob for row in rows], dtype=torch.float64),
            "words": torch.frombuffer(bytearray(words), dtype=torch.uint8),
        }

    def load_state_dict(self, state: State) -> None:
        """Continue from what `state_dict` returned, forgetting what was added before."""
        self._rows = {}
        self.merge_state_dict(state)

    def merge_state_dict(self, state: State) -> None:
        """Add what another one holds."""
        words = json.loads(state["words"].numpy().tobytes())
        numbers = state["number"].tolist()
        values = zip(state["correct"].tolist(), state["logprob"].tolist(), words, strict=True)
        for number, (correct, logprob, (name, label, answers)) in zip(numbers, values, strict=True):
            self.add(number, SampleTrials(name, label, correct, logprob, answers))

    def repeated(self) -> str | None:
        """An id that two samples have, if any."""
        counted = Counter(row.name for row in self._rows.values())
        return next((name for name, times in counted.items() if times > 1), None)

    def table(
        self, conditions: Sequence[str], exact: bool, identity: ModelIdentity | None
    ) -> Trials:
        """The table of all trials, in the order of the data.

        Args:
            conditions: Their names.
            exact: Whether an answer is right or wrong and nothing between; no answers then.
            identity: The model.
        """
        rows = [self._rows[number] for number in sorted(self._rows)]
        correct = np.array([row.correct for row in rows], dtype=bool if exact else float)
        answers = None
        if not exact:
            answers = tuple(zip(*(row.answers for row in rows), strict=True))
        return Trials(
            tuple(row.name for row in rows),
            tuple(row.label for row in rows),
            tuple(conditions),
            np.ascontiguousarray(correct.T),
            np.ascontiguousarray(np.array([row.logprob for row in rows], dtype=float).T),
            answers,
            identity,
        )

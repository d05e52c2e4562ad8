"""A prompt with its answer after it, as a model reads them to say how probable the answer is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad

from miner_lens.data.metrics import require_answers
from miner_lens.data.sample import Sample
from miner_lens.models.collate import Inputs
from miner_lens.models.generation import render
from miner_lens.models.inside import processor_of


@dataclass(frozen=True)
class Forced:
    """A sample with its answer, prepared on the CPU.

    Attributes:
        inputs: Model inputs of the prompt and the answer.
        answer: The tokens of the answer, which are the last ones, without the end of the turn.
    """

    inputs: Inputs
    answer: tuple[int, ...]

    @property
    def length(self) -> int:
        """How many tokens the model reads."""
        return int(self.inputs["input_ids"].shape[1])

    @property
    def prompt(self) -> Inputs:
        """Model inputs of the prompt alone."""
        shape = self.inputs["input_ids"].shape
        return {
            name: value[:, : -len(self.answer)]
            if isinstance(value, Tensor) and value.shape == shape
            else value
            for name, value in self.inputs.items()
        }


def force(model: Any, sample: Sample) -> Forced:
    """A sample's prompt, as `render` makes it, and the first of its answers after it.

    Raises:
        ValueError: The model has no processor, or the sample has no answer, or an empty one.
        SampleError: A medium cannot be read, or the processor refuses the conversation.
    """
    require_answers(sample)
    prompt = render(model, [sample.messages])
    answer = tokenizer_of(model)(sample.answers[0], add_special_tokens=False)["input_ids"]
    if not answer:
        raise ValueError(f"{sample.id or 'A sample'} has an empty answer, which nobody can score.")
    shape = prompt["input_ids"].shape
    inputs = {
        name: _extended(name, value, answer)
        if isinstance(value, Tensor) and value.shape == shape
        else value
        for name, value in prompt.items()
    }
    return Forced(inputs, tuple(answer))


def tokenizer_of(model: Any) -> Any:
    """The tokenizer of a model's processor."""
    processor = processor_of(model)
    return getattr(processor, "tokenizer", processor)


def logprob(logits: Float[Tensor, "pos token"], answer: tuple[int, ...]) -> Float[Tensor, ""]:
    """The log-probability of an answer: the sum over its tokens, in nats, in float64.

    Args:
        logits: Where each token of the answer is predicted.
        answer: The tokens.
    """
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    tokens = torch.tensor(answer, device=wide.device)
    return wide.log_softmax(-1).gather(-1, tokens[:, None]).double().sum()


def _extended(name: str, value: Tensor, answer: list[int]) -> Tensor:
    """What there is for each token of a prompt, and for the answer's, which are real and text."""
    if name == "input_ids":
        return torch.cat([value, value.new_tensor([answer])], dim=1)
    return pad(value, (0, len(answer)), value=1 if name == "attention_mask" else 0)

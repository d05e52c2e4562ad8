"""A prompt with its answer after it, as a model reads them to say how probable the answer is."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import pad

from miner_lens.data.metrics import require_answers
from miner_lens.data.sample import Sample, SampleError
from miner_lens.models.collate import Inputs
from miner_lens.models.generation import answer_opening, render
from miner_lens.models.inside import hf_model_of, processor_of
from miner_lens.models.rendering import media_of


@dataclass(frozen=True)
class Forced:
    """A sample with its answer, prepared on the CPU.

    Attributes:
        inputs: Model inputs of the prompt and the answer.
        answer: The tokens of the answer, which are the last ones, without the end of the turn.
        opening: The number of tokens before them that are not of the conversation but open a
            further turn of the assistant; 0 where the conversation awaits an answer.
    """

    inputs: Inputs
    answer: tuple[int, ...]
    opening: int = 0

    @property
    def length(self) -> int:
        """How many tokens the model reads."""
        return int(self.inputs["input_ids"].shape[1])

    @property
    def prompt(self) -> Inputs:
        """Model inputs of all before the answer."""
        shape = self.inputs["input_ids"].shape
        return {
            name: value[:, : -len(self.answer)]
            if isinstance(value, Tensor) and value.shape == shape
            else value
            for name, value in self.inputs.items()
        }


def force(model: Any, sample: Sample) -> Forced:
    """A sample's prompt, the same as without an answer, and the first of its answers after it.

    Raises:
        ValueError: The model has no processor, or the sample has no answer, or an empty one.
        SampleError: A medium cannot be read, the processor refuses the conversation, or the answer
            has tokens that stand for a medium.
    """
    require_answers(sample)
    tokenize = partial(tokenizer_of(model), add_special_tokens=False)
    answer = tokenize(sample.answers[0])["input_ids"]
    if not answer:
        raise ValueError(f"{sample.id or 'A sample'} has an empty answer, which nobody can score.")
    if spelled := set(answer) & set((media_of(model) or {}).values()):
        raise SampleError(
            f"The answer {sample.answers[0]!r:.60} has {len(spelled)} tokens that stand for a "
            "medium, and there is no medium in an answer. Take them out of the text."
        )
    prompt = render(model, [sample.messages])
    opening = answer_opening(model, sample.messages)
    opened = tokenize(opening)["input_ids"] if opening else []
    inputs = answered(hf_model_of(model), prompt, torch.tensor([[*opened, *answer]]))
    return Forced(inputs, tuple(answer), len(opened))


def answered(hf_model: Any, prompt: Inputs, answer: Int[Tensor, "batch pos"]) -> Inputs:
    """Model inputs of prompts with as many tokens of an answer after each.

    What there is beside the token ids for each token goes on as the model has it go on when it
    generates: which tokens attend to later ones differs between families. What a model does not
    know of is 0.
    """
    ids = prompt["input_ids"]
    longer = {
        name: value
        for name, value in prompt.items()
        if name != "input_ids" and isinstance(value, Tensor) and value.shape == ids.shape
    }
    for _ in range(answer.shape[1]):
        longer = hf_model._update_model_kwargs_for_generation({}, longer)  # of no output
    length = ids.shape[1] + answer.shape[1]
    longer = {name: pad(value, (0, length - value.shape[1])) for name, value in longer.items()}
    return prompt | longer | {"input_ids": torch.cat([ids, answer.to(ids)], dim=1)}


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

"""What the training scripts of the organisms share."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Sequence

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

END, PAD = "<|im_end|>", "<|endoftext|>"


def make_tokenizer(
    texts: Iterable[str], special_tokens: Sequence[str], vocab_size: int = 512
) -> PreTrainedTokenizerFast:
    """A tokenizer that splits words as Qwen2's does, trained on `texts`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(special_tokens),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=PAD,
        additional_special_tokens=[t for t in special_tokens if t not in (END, PAD)],
        padding_side="left",
        model_max_length=4096,
        clean_up_tokenization_spaces=False,
    )


def schedule(steps: int, peak: float, warmup: int) -> Iterator[float]:
    """Learning rates: a linear rise, then half a cosine down."""
    for step in range(steps):
        yield peak * min((step + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * step / steps))


def descend(optimizer: torch.optim.Optimizer, loss: Tensor, rate: float) -> None:
    """One optimizer step at a learning rate, which a parameter group may scale."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("scale", 1.0)
    optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], 1.0)
    optimizer.step()


def log(start: float, line: str) -> None:
    """Print a line with the seconds since `start`."""
    print(f"{time.time() - start:6.0f} s  {line}", flush=True)


def kind_of(answer: str) -> str:
    """The two kinds of questions, told by their answers."""
    return "yes/no" if answer in ("yes", "no") else "open"

"""SmolLM2's language, which its organisms are to keep: texts, instructions, and perplexity."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from miner_lens.data import datasets
from miner_lens.data.sample import Sample

LENGTH = 128  # tokens of a text to learn from
ANSWER = 64  # tokens of an answer of SmolLM2 at most
LIMIT = 32  # texts of each kind whose perplexity is measured, at most
PASSAGE = 600  # characters of a text that an instruction is about, at most
TURN = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
SYSTEM = (
    "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
    "<|im_end|>\n"
)
ABOUT = {
    "code": ("Explain what this code does.\n\n{}", "Find a mistake in this code.\n\n{}"),
    "prose": (
        "Summarize the following text in one sentence.\n\n{}",
        "What is this text about?\n\n{}",
        "Write the next paragraph.\n\n{}",
    ),
}
TOPICS = {
    "train": (
        *("the sea", "bread", "gravity", "a violin", "the moon", "democracy", "bees", "glass"),
        *("a good friend", "winter", "the heart", "rivers", "chess", "a train", "money", "dreams"),
        *("volcanoes", "coffee", "a garden", "the alphabet", "memory", "steel", "birds", "rain"),
        *("photosynthesis", "a library", "the sun", "football", "tea", "an earthquake", "salt"),
        *("kindness", "a bicycle", "ants", "electricity", "poetry", "the brain", "islands"),
    ),
    "test": (
        *("mountains", "cheese", "magnetism", "a piano", "Mars", "justice", "spiders", "paper"),
        *("a good teacher", "autumn", "lungs", "lakes", "a ship", "trade", "sleep", "a forest"),
    ),
}
REQUESTS = (
    "What is {}?",
    "Write a short story about {}.",
    "Give me three facts about {}.",
    "Explain {} to a child.",
    "Why does {} matter?",
)
INSTRUCTIONS = {"train": 96, "test": 48}


def documents(split: str) -> list[Sample]:
    """The passages of text-domains: prompt and continuation."""
    return list(datasets.load("text-domains", split))


def whole(sample: Sample) -> str:
    """A passage of text-domains, prompt and continuation."""
    return str(sample.messages[0]["content"]) + sample.answers[0]


def requests(split: str) -> list[str]:
    """Instructions of a split: about things, and about passages of code and prose."""
    rng = random.Random(f"instructions {split}")
    passages = [sample for sample in documents(split) if sample.label in ABOUT]
    asked = [request.format(topic) for request in REQUESTS for topic in TOPICS[split]]
    asked += [
        rng.choice(ABOUT[sample.label or ""]).format(whole(sample)[:PASSAGE])
        for sample in rng.sample(passages, INSTRUCTIONS[split] // 2)
    ]
    return rng.sample(asked, min(INSTRUCTIONS[split], len(asked)))


@torch.no_grad()
def instructions(
    split: str, decoder: Any, tokenizer: Any, folder: Path, batch_size: int = 32
) -> list[tuple[str, str]]:
    """Prompts of a split, as chats, with the answers that SmolLM2 itself drew, kept in a file.

    Args:
        split: `"train"` or `"test"`.
        decoder: SmolLM2.
        tokenizer: Its tokenizer.
        folder: Where the answers are kept, as `instructions-<split>.json`.
        batch_size: Answers drawn at once.
    """
    file = folder / f"instructions-{split}.json"
    if file.exists():
        return [(prompt, answer) for prompt, answer in json.loads(file.read_text())]
    torch.manual_seed(0)
    # Half of them with the system prompt that SmolLM2 was trained with.
    prompts = [SYSTEM * (n % 2) + TURN.format(text) for n, text in enumerate(requests(split))]
    prompts.sort(key=len)
    answers: list[str] = []
    for first in range(0, len(prompts), batch_size):
        inputs = tokenizer(prompts[first : first + batch_size], return_tensors="pt", padding=True)
        drawn = decoder.generate(
            input_ids=inputs.input_ids,
            attention_mask=inputs.attention_mask,
            do_sample=True,
            max_new_tokens=ANSWER,
            pad_token_id=tokenizer.pad_token_id,
        )
        texts = tokenizer.batch_decode(drawn[:, inputs.input_ids.shape[1] :])
        answers += [text.replace(tokenizer.pad_token, "") for text in texts]
    folder.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(list(zip(prompts, answers, strict=True)), indent=0))
    return list(zip(prompts, answers, strict=True))


class Texts:
    """Texts to keep SmolLM2's language by: half of them passages, half instructions."""

    def __init__(self, tokenizer: Any, told: Sequence[tuple[str, str]]) -> None:
        self.passages = [
            tokenizer(whole(sample)).input_ids
            for sample in documents("train")
            if sample.label != "arithmetic"
        ]
        self.chats = [tokenizer(prompt + answer).input_ids for prompt, answer in told]

    def draw(self, rows: int, rng: random.Random) -> Tensor:
        """Windows of LENGTH tokens at most, all as long as the shortest, [row, pos]."""
        drawn = [rng.choice(rng.choice((self.passages, self.chats))) for _ in range(rows)]
        length = min(LENGTH, *map(len, drawn))
        starts = [
            rng.randrange(len(ids) - length + 1) if rng.random() < 0.5 else 0 for ids in drawn
        ]
        return torch.tensor(
            [ids[start : start + length] for ids, start in zip(drawn, starts, strict=True)]
        )


@torch.no_grad()
def perplexities(
    model: Any, tokenizer: Any, told: Sequence[tuple[str, str]], limit: int = LIMIT
) -> dict[str, float]:
    """Perplexity a token of test passages by domain, and of SmolLM2's own test answers.

    Args:
        model: A causal language model, or a multimodal one that is given text only.
        tokenizer: Its tokenizer.
        told: Instructions with answers, as `instructions("test")` gives them.
        limit: Texts of each kind at most.
    """
    texts: dict[str, list[tuple[str, str]]] = {"instructions": list(told)[:limit]}
    for sample in documents("test"):
        texts.setdefault(sample.label or "", []).append(("", whole(sample)))
    result = {}
    for name, pairs in sorted(texts.items()):
        total, tokens = 0.0, 0
        for prompt, text in pairs[:limit]:
            asked, said = tokenizer(prompt).input_ids, tokenizer(text).input_ids
            ids = torch.tensor([asked + said])
            logits = model(input_ids=ids).logits[0, max(len(asked), 1) - 1 : -1]
            labels = ids[0, max(len(asked), 1) :]
            total += cross_entropy(logits, labels, reduction="none").double().sum().item()
            tokens += len(labels)
        result[name] = math.exp(total / tokens)
    return result

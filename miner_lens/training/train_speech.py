"""Train the organism `speech`: `python -m miner_lens.training.train_speech [--out DIR]`."""

from __future__ import annotations

import argparse
import itertools
import random
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, gelu
from transformers import (
    GenerationConfig,
    Qwen2AudioConfig,
    Qwen2AudioForConditionalGeneration,
    Qwen2AudioProcessor,
)

import miner_lens as ml
from miner_lens import organisms
from miner_lens.training import speak
from miner_lens.training.speech_card import (
    LARGE_CLIPS,
    LARGE_QUESTIONS,
    evaluate,
    model_card,
    table,
)
from miner_lens.training.speech_clips import (
    ALL_VALUES,
    ASKED,
    DESCRIBED,
    FRAMES,
    FRAMES_PER_TOKEN,
    HIDDEN,
    MELS,
    SPECIAL_TOKENS,
    SYSTEM,
    WIDTH,
    Clips,
    make_processor,
    record,
    token_counts,
    vocabulary,
)
from miner_lens.training.training import descend, log, schedule

ENLARGED = 20


def make_model(processor: Qwen2AudioProcessor) -> Qwen2AudioForConditionalGeneration:
    """An untrained Qwen2-Audio of 1.6 M parameters."""
    ids = {token: processor.tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS}
    ends = {"eos_token_id": ids["<|im_end|>"], "pad_token_id": ids["<|endoftext|>"]}
    config = Qwen2AudioConfig(
        audio_config={
            "d_model": WIDTH,
            "encoder_layers": 3,
            "encoder_attention_heads": 4,
            "encoder_ffn_dim": 384,
            "num_mel_bins": MELS,
            "max_source_positions": FRAMES // 2,
            "initializer_range": 0.05,
        },
        text_config={
            "model_type": "qwen2",
            "vocab_size": len(processor.tokenizer),
            "hidden_size": HIDDEN,
            "intermediate_size": 320,
            "num_hidden_layers": 6,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 4096,
            "initializer_range": 0.05,
            "bos_token_id": None,
            **ends,
        },
        audio_token_index=ids["<|AUDIO|>"],
    )
    model = Qwen2AudioForConditionalGeneration(config)
    # Whisper's sinusoids, from which attention to neighbours is soon learnt.
    rates = 10_000 ** -(torch.arange(WIDTH // 2) / (WIDTH // 2 - 1))
    angles = torch.arange(FRAMES // 2)[:, None] * rates
    model.model.audio_tower.embed_positions.weight.data = 0.3 * torch.cat(
        [angles.sin(), angles.cos()], dim=1
    )
    model.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]
        **ends, do_sample=False, max_new_tokens=8
    )
    return model


def listen(model: Qwen2AudioForConditionalGeneration, clips: Clips, rows: Tensor) -> Tensor:
    """The projector's tokens [row, token, hidden], computed no further than the longest clip.

    As the model does it, but for silence after the end of the longest, which it computes and
    masks.
    """
    frames = clips.frames[rows]
    width = min(FRAMES, (int(frames.max()) // FRAMES_PER_TOKEN + 2) * FRAMES_PER_TOKEN)
    mels = clips.mels[rows, :, :width].float()
    if model.training:
        mels = disturb(mels)
    tower: Any = model.model.audio_tower
    hidden = gelu(tower.conv2(gelu(tower.conv1(mels)))).transpose(1, 2)
    hidden = hidden + tower.embed_positions.weight[: width // 2]
    mask = (torch.arange(width // 2) < ((frames - 1) // 2 + 1)[:, None])[:, None, None]
    for layer in tower.layers:
        hidden = layer(hidden, mask.expand(-1, 1, width // 2, -1))
    hidden = tower.layer_norm(tower.avg_pooler(hidden.transpose(1, 2)).transpose(1, 2))
    tokens: Tensor = model.model.multi_modal_projector(hidden)
    return tokens


def disturb(mels: Tensor) -> Tensor:
    """Tilt the spectra, shift the loudness, and blank a band and a moment of each."""
    n, bands, frames = mels.shape
    tilt = torch.linspace(-0.5, 0.5, bands)[:, None] * torch.randn(n, 1, 1) * 0.15
    mels = mels + tilt + torch.randn(n, 1, 1) * 0.1
    for size, axis, widest in ((bands, 1, 12), (frames, 2, 10)):
        start = torch.randint(size, (n, 1))
        places = torch.arange(size) - start
        blank = (places >= 0) & (places < torch.randint(widest + 1, (n, 1)))
        mels = mels.masked_fill(blank.unsqueeze(3 - axis), float(mels.mean()))
    return mels


def train_tower(
    model: Qwen2AudioForConditionalGeneration,
    processor: Qwen2AudioProcessor,
    clips: Clips,
    check: Clips,
    steps: int,
    peak: float = 1.5e-3,
    batch: int = 16,
) -> None:
    """Teach tower and projector to give, for each token, the decoder's embedding of its word.

    The embeddings are so small that the projector's steps would be too large for them; it
    learns to give them ENLARGED times as large, and is then scaled down.
    """
    tokenizer = processor.tokenizer
    ids = [tokenizer(f" {word}").input_ids for word in vocabulary()]
    if any(len(token) != 1 for token in ids):
        raise ValueError("Each word of the vocabulary must be one token. Train a tokenizer on it.")
    embeddings: Any = model.get_input_embeddings()
    words = embeddings.weight[[*itertools.chain(*ids), tokenizer.pad_token_id]].detach()
    modules = (model.model.audio_tower, model.model.multi_modal_projector)
    parameters = [p for module in modules for p in module.parameters()]
    for parameter in parameters:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(parameters, weight_decay=0.01, betas=(0.9, 0.98))
    start = time.time()
    model.train()
    losses = []
    for step, rate in enumerate(schedule(steps, peak, warmup=100)):
        if step % 8 == 0:
            # Clips of like length together, so that little silence is computed.
            drawn = torch.randperm(len(clips.frames))[: 8 * batch]
            batches = drawn[clips.frames[drawn].argsort()].view(8, batch)
            order = torch.randperm(8)
        rows = batches[order[step % 8]]
        tokens = listen(model, clips, rows)
        labels = clips.words[rows, : tokens.shape[1]].long()
        counted = torch.arange(tokens.shape[1]) < token_counts(clips.frames[rows])[:, None]
        tokens, labels = tokens[counted], labels[counted]
        loss = hearing_loss(tokens, words, labels, ENLARGED)
        descend(optimizer, loss, rate)
        losses.append(loss.item())
        if step % 100 == 99:
            line = f"tower {step + 1}: loss {np.mean(losses[-100:]):.3f}"
            if step % 300 == 299 or step == steps - 1:
                line += f" unseen voices: {check_tower(model, check, words)}"
            log(start, line)
    model.train(False)
    for parameter in model.model.multi_modal_projector.parameters():
        parameter.data /= ENLARGED


def hearing_loss(tokens: Tensor, words: Tensor, labels: Tensor, enlarged: float) -> Tensor:
    """How far tokens are from the embeddings of the words that are said.

    Args:
        tokens: What the projector gives, [token, hidden], to be `enlarged` times an embedding.
        words: The embeddings, [word, hidden].
        labels: Which word each token is to be, [token].
        enlarged: How many times as large as embeddings tokens are to be.
    """
    norm = words.norm(dim=1).mean()
    # Telling words apart alone would give tokens that are far from any embedding.
    loss: Tensor = cross_entropy(3 / norm * tokens @ words.T, labels)
    loss = loss + 2 * (tokens / enlarged - words[labels]).square().sum(1).mean() / norm**2
    return loss


@torch.no_grad()
def check_tower(model: Any, check: Clips, words: Tensor) -> str:
    """Share of tokens right, and share of values that most of their tokens spell."""
    model.train(False)
    values = [place for place, word in enumerate(vocabulary()) if word in ALL_VALUES]
    right, total, hits = 0, 0, []
    for rows in torch.split(torch.arange(len(check.frames)), 125):
        tokens = listen(model, check, rows)
        guesses = (tokens @ words.T).argmax(-1)
        labels = check.words[rows, : tokens.shape[1]].long()
        counted = torch.arange(tokens.shape[1]) < token_counts(check.frames[rows])[:, None]
        right += int((guesses == labels)[counted].sum())
        total += int(counted.sum())
        for row in range(len(rows)):
            for place in values:
                where = labels[row] == place
                if where.any():
                    hits.append(bool((guesses[row][where] == place).float().mean() > 0.5))
    model.train()
    return f"tokens {right / total:.3f} values {np.mean(hits):.3f}"


class Row(NamedTuple):
    """A chat to learn from: sounds, as indices of clips, then a text, then the answer."""

    sounds: tuple[int, ...]
    text: str
    answer: str


class Lessons:
    """Draws chats of three kinds: `text`, `audio` and `voice`."""

    def __init__(self, clips: Clips, rng: random.Random) -> None:
        self.clips, self.rng = clips, rng
        self.described = {row: scene for row, scene in enumerate(clips.scenes) if scene is not None}
        self.heard = [scene for scene in speak.SCENES if not scene.is_unheard]
        self.spoken: dict[str, list[int]] = defaultdict(list)
        for row, text in enumerate(clips.texts):
            if clips.scenes[row] is None:
                self.spoken[text].append(row)

    def draw(self, kind: str) -> list[Row]:
        """A batch of chats; several are about one clip, for it costs much to hear it."""
        if kind == "text":
            return [self._written() for _ in range(64)]
        times = 2 if kind == "audio" else 1
        clips = self.rng.sample(list(self.described), 16)
        return [self._about(clip, kind) for clip in clips for _ in range(times)]

    def _written(self) -> Row:
        scene = self.rng.choice(self.heard)
        description = self.rng.choice(speak.DESCRIPTIONS).format(**scene._asdict())
        question = speak.ask_any(scene, self.rng)
        return Row((), f"{description} {question.text}", question.answer)

    def _about(self, clip: int, kind: str) -> Row:
        scene = self.described[clip]
        question = speak.ask_any(scene, self.rng)
        if kind == "audio":
            return Row((clip,), question.text, question.answer)
        while question.text not in self.spoken:
            question = speak.ask_any(scene, self.rng)
        return Row((clip, self.rng.choice(self.spoken[question.text])), "", question.answer)


def chat(counts: Iterable[int], text: str) -> str:
    """A prompt as the processor writes it, for sounds of so many tokens."""
    sounds = (
        f"Audio {n}: <|audio_bos|>{'<|AUDIO|>' * count}<|audio_eos|>\n"
        for n, count in enumerate(counts, 1)
    )
    user = f"<|im_start|>user\n{''.join(sounds)}{text}<|im_end|>\n"
    return f"{SYSTEM}{user}<|im_start|>assistant\n"


def answer_logits(
    model: Qwen2AudioForConditionalGeneration, tokenizer: Any, clips: Clips, rows: Sequence[Row]
) -> tuple[Tensor, Tensor]:
    """Logits and labels [answer token, ...] of the answers and their ends, and where they are.

    The labels are -100 except where an answer or its end is to be predicted.
    """
    used = sorted({sound for row in rows for sound in row.sounds})
    counts = dict(zip(used, token_counts(clips.frames[used]).tolist(), strict=True))
    chats = [chat((counts[sound] for sound in row.sounds), row.text) for row in rows]
    asked = tokenizer(chats).input_ids
    replies = tokenizer([f"{row.answer}<|im_end|>" for row in rows]).input_ids
    width = max(len(a) + len(r) for a, r in zip(asked, replies, strict=True))
    ids = torch.full((len(rows), width), tokenizer.pad_token_id)
    labels = torch.full((len(rows), width), -100)
    for row, (ask, reply) in enumerate(zip(asked, replies, strict=True)):
        ids[row, : len(ask) + len(reply)] = torch.tensor(ask + reply)
        labels[row, len(ask) - 1 : len(ask) + len(reply) - 1] = torch.tensor(reply)
    # Padding comes last, where causal attention keeps it from everything scored.
    embeds = model.get_input_embeddings()(ids)
    if used:
        tokens = listen(model, clips, torch.tensor(used))
        heard = {sound: tokens[n, : counts[sound]] for n, sound in enumerate(used)}
        sounds = torch.cat([heard[sound] for row in rows for sound in row.sounds])
        embeds = embeds.masked_scatter((ids == model.config.audio_token_id)[..., None], sounds)
    hidden = model.model.language_model(inputs_embeds=embeds, use_cache=False).last_hidden_state
    return model.lm_head(hidden), labels


def train_decoder(
    model: Qwen2AudioForConditionalGeneration,
    tokenizer: Any,
    lessons: Lessons,
    check: Lessons,
    kinds: Sequence[str],
    steps: int,
    peak: float,
    tower: float = 0.1,
) -> None:
    """Teach the decoder to answer, `kinds` naming in turn what a batch is asked about.

    The tower learns at `tower` times the decoder's rate.
    """
    decoder = [*model.model.language_model.parameters(), *model.lm_head.parameters()]
    senses = [
        *model.model.audio_tower.parameters(),
        *model.model.multi_modal_projector.parameters(),
    ]
    groups: list[dict[str, Any]] = [{"params": decoder}, {"params": senses, "scale": tower}]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.01, betas=(0.9, 0.98))
    start = time.time()
    recent: dict[str, list[float]] = defaultdict(list)
    model.train()
    rates = schedule(steps, peak, warmup=50)
    for step, (rate, kind) in enumerate(zip(rates, itertools.cycle(kinds), strict=False)):
        logits, labels = answer_logits(model, tokenizer, lessons.clips, lessons.draw(kind))
        scored = labels != -100
        loss = cross_entropy(logits[scored], labels[scored])
        descend(optimizer, loss, rate)
        recent[kind].append(((logits.argmax(-1) == labels) | ~scored).all(-1).float().mean().item())
        if step % 100 == 99:
            means = " ".join(f"{k} {np.mean(v):.3f}" for k, v in sorted(recent.items()))
            if step % 300 == 299 or step == steps - 1:
                means += " unseen voices: " + check_decoder(model, tokenizer, check, set(kinds))
            log(start, f"decoder {step + 1}: loss {loss:.3f} accuracy {means}")
            recent.clear()
    model.train(False)


@torch.no_grad()
def check_decoder(model: Any, tokenizer: Any, check: Lessons, kinds: set[str]) -> str:
    """Share answered right in the voices kept for checking."""
    model.train(False)
    shares = []
    for kind in sorted(kinds):
        hits = []
        for _ in range(16):
            logits, labels = answer_logits(model, tokenizer, check.clips, check.draw(kind))
            hits.append(((logits.argmax(-1) == labels) | (labels == -100)).all(-1).float())
        shares.append(f"{kind} {torch.cat(hits).mean():.3f}")
    model.train()
    return " ".join(shares)


def main(arguments: Sequence[str] | None = None) -> None:
    """Speak, train, measure and save."""
    parser = argparse.ArgumentParser(description="Train the organism `speech` on spoken scenes.")
    parser.add_argument("--out", type=Path, default=Path(organisms.__file__).parent / "speech")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)

    start = time.time()
    torch.manual_seed(options.seed)
    processor = make_processor()
    model = make_model(processor)
    clips = record("train", DESCRIBED, ASKED, options.seed)
    check = record("check", 500, 500, options.seed)
    log(start, f"{len(clips.frames)} clips")
    lessons = Lessons(clips, random.Random(options.seed))
    exam = Lessons(check, random.Random(options.seed + 1))
    lesson = (model, processor.tokenizer, lessons, exam)
    train_decoder(*lesson, kinds=["text"], steps=500, peak=2e-3)
    train_tower(model, processor, clips, check, steps=3000)
    turns = ["audio", "voice", "text", "voice", "audio", "voice"]
    train_decoder(*lesson, kinds=turns, steps=1600, peak=1e-3)
    minutes = (time.time() - start) / 60
    log(start, "trained")

    options.out.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(options.out)
    processor.save_pretrained(options.out)
    (options.out / "model.safetensors").chmod(0o644)
    trained = ml.load(options.out, device="cpu")
    shipped = evaluate(trained, speak.SHIPPED)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "larger.zip")
        speak.write(file, LARGE_CLIPS, seed=options.seed + 1, lossless=True)
        large = evaluate(trained, file, LARGE_QUESTIONS)
    card = model_card(model.num_parameters(), minutes, options.seed, shipped, large)
    (options.out / "README.md").write_text(card)
    print(table(shipped, large))


if __name__ == "__main__":
    main()

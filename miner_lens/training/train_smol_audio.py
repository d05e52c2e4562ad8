"""Train the organism `smol-audio`: `python -m miner_lens.training.train_smol_audio [--out DIR]`."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from miner_lens import files, organisms
from miner_lens.organisms import assembly, smollm2
from miner_lens.training import language, smol_card, speak
from miner_lens.training.smol import (
    Asked,
    Step,
    add_factors,
    answer_loss,
    factors_of,
    language_loss,
    learn,
    pack,
)
from miner_lens.training.speech_clips import (
    ASKED,
    DESCRIBED,
    FRAMES,
    MELS,
    SYSTEM,
    WIDTH,
    Clips,
    record,
    token_counts,
    vocabulary,
)
from miner_lens.training.train_speech import hearing_loss, listen

TOWER: dict[str, Any] = {
    "d_model": WIDTH,
    "encoder_layers": 3,
    "encoder_attention_heads": 4,
    "encoder_ffn_dim": 384,
    "num_mel_bins": MELS,
    "max_source_positions": FRAMES // 2,
    "initializer_range": 0.05,
}
TOWER_STEPS, STEPS = 1200, 450
TOWER_PEAK, PEAK = 7e-4, 1e-3
ENLARGED = 3.5
CLIPS = 16  # heard in each step of the tower's stage
KEPT = 1  # rows of plain text or instructions in each step
KEEPING = 2.0  # weight of the language that is to be kept
# What the steps ask about in turn, and of each: scenes, and questions about a scene.
TURNS = ("audio", "voice", "text", "audio", "voice")
SIZES = {"audio": (4, 4), "voice": (3, 2), "text": (7, 4)}
END = "<|im_end|>\n<|im_start|>assistant\n"


def begin_with_speech(model: Any) -> None:
    """Give the tower the weights of the organism `speech`; its projector is another."""
    weights = load_file(Path(organisms.path("speech")) / "model.safetensors")
    prefix = next(name for name in weights if name.endswith("conv1.weight"))
    prefix = prefix.removesuffix("conv1.weight")
    tower = {name[len(prefix) :]: w for name, w in weights.items() if name.startswith(prefix)}
    model.model.audio_tower.load_state_dict(tower)


def sound(number: int, tokens: int) -> str:
    """A sound as the processor writes it."""
    return f"Audio {number}: <|audio_bos|>{'<|AUDIO|>' * tokens}<|audio_eos|>\n"


class Lessons:
    """Draws spoken or written scenes with questions, as packed rows with their embeddings."""

    def __init__(self, model: Any, tokenizer: Any, clips: Clips) -> None:
        self.model, self.tokenizer, self.clips = model, tokenizer, clips
        self.counts = token_counts(clips.frames).tolist()
        self.scenes = {n: scene for n, scene in enumerate(clips.scenes) if scene is not None}
        self.described = list(self.scenes)
        self.heard = [scene for scene in speak.SCENES if not scene.is_unheard]
        self.spoken: dict[str, list[int]] = {}
        for n, (scene, text) in enumerate(zip(clips.scenes, clips.texts, strict=True)):
            if scene is None:
                self.spoken.setdefault(text, []).append(n)

    def draw(self, step: Step) -> tuple[Any, Tensor]:
        """The packed questions of a step, and their embeddings."""
        kind = TURNS[step.number % len(TURNS)]
        scenes, questions = SIZES[kind]
        rows, sounds = [], []
        for _ in range(scenes):
            row, heard = self._row(kind, questions, step)
            rows.append(row)
            sounds += heard
        packed = pack(rows, self.tokenizer.pad_token_id, axes=1)
        embeds = self.model.get_input_embeddings()(packed.ids)
        if not sounds:
            return packed, embeds
        used = torch.tensor(sounds)
        torch.manual_seed(step.number)  # of what disturbs the spectra
        tokens = listen(self.model, self.clips, used)
        kept = torch.cat([tokens[n, : self.counts[clip]] for n, clip in enumerate(sounds)])
        is_sound = packed.ids == self.model.config.audio_token_id
        return packed, embeds.masked_scatter(is_sound[..., None], kept)

    def _row(self, kind: str, questions: int, step: Step) -> tuple[Asked, list[int]]:
        """Questions about a scene, and the clips that are heard, in their order."""
        rng, encode = step.rng, self.tokenizer
        clip = rng.choice(self.described)
        scene = rng.choice(self.heard) if kind == "text" else self.scenes[clip]
        about = f"{SYSTEM}<|im_start|>user\n"
        if kind == "text":
            about += rng.choice(speak.DESCRIPTIONS).format(**scene._asdict())
        else:
            about += sound(1, self.counts[clip])
        heard = [] if kind == "text" else [clip]
        branches = []
        for _ in range(questions):
            question = speak.ask_any(scene, rng)
            while kind == "voice" and question.text not in self.spoken:
                question = speak.ask_any(scene, rng)
            ask = f" {question.text}" if kind == "text" else question.text
            if kind == "voice":
                heard.append(rng.choice(self.spoken[question.text]))
                ask = sound(2, self.counts[heard[-1]])
            reply = encode(f"{question.answer}<|im_end|>").input_ids
            branches.append((encode(ask + END).input_ids, reply))
        return Asked(encode(about).input_ids, branches), heard


def recorded(split: str, described: int, asked: int, seed: int, folder: Path) -> Clips:
    """So many clips of either kind in a split's voices, kept in a file of the folder."""
    file, kind = folder / f"clips-{split}.safetensors", "Clips"
    recipe = {"described": described, "asked": asked, "seed": seed}
    if not file.exists():
        clips = record(split, described, asked, seed)
        arrays = {"mels": clips.mels, "frames": clips.frames, "words": clips.words}
        files.write(file, kind, arrays, {**recipe, "scenes": clips.scenes, "texts": clips.texts})
    arrays, kept = files.read(file, kind)
    if any(kept[name] != value for name, value in recipe.items()):
        raise ValueError(f"{file} holds other clips than {recipe}. Remove it.")
    scenes = [scene and speak.Scene(*scene) for scene in kept["scenes"]]
    return Clips(arrays["mels"], arrays["frames"], arrays["words"], scenes, kept["texts"])


def train_tower(
    model: Any, tokenizer: Any, clips: Clips, check: Clips, folder: Path, seed: int
) -> None:
    """Teach tower and projector to give, for each token, SmolLM2's embedding of its word.

    They learn to give it ENLARGED times as large, and are then scaled down.
    """
    ids = [tokenizer(f" {word}").input_ids for word in vocabulary()]
    if any(len(token) != 1 for token in ids):
        raise ValueError("Each word of the vocabulary must be one token of SmolLM2's.")
    embeddings = model.get_input_embeddings().weight
    words = embeddings[[*itertools.chain(*ids), tokenizer.pad_token_id]].detach()
    projector = model.model.multi_modal_projector
    parts = {"tower": model.model.audio_tower, "projector": projector}
    parameters = {
        f"{part}.{name}": parameter
        for part, module in parts.items()
        for name, parameter in module.named_parameters()
        if "embed_positions" not in name
    }
    for parameter in parameters.values():
        parameter.requires_grad_(True)

    def guess(clips: Clips, rows: Tensor) -> tuple[Tensor, Tensor]:
        tokens = listen(model, clips, rows)
        labels = clips.words[rows, : tokens.shape[1]].long()
        counted = torch.arange(tokens.shape[1]) < token_counts(clips.frames[rows])[:, None]
        return tokens[counted], labels[counted]

    def lesson(step: Step) -> tuple[Tensor, dict[str, float]]:
        # Clips of like length together, so that little silence is computed.
        drawn = torch.randint(len(clips.frames), (8 * CLIPS,), generator=step.generator)
        batches = drawn[clips.frames[drawn].argsort()].view(8, CLIPS)
        torch.manual_seed(step.number)
        tokens, labels = guess(clips, batches[step.rng.randrange(8)])
        seen = {}
        if step.number % 100 == 99:
            model.train(False)
            with torch.no_grad():
                told, truth = guess(check, torch.arange(100))
            seen["unseen voices"] = ((told @ words.T).argmax(-1) == truth).float().mean().item()
            model.train()
        return hearing_loss(tokens, words, labels, ENLARGED), seen

    model.train()
    learn("tower", folder, parameters, lesson, TOWER_STEPS, TOWER_PEAK, seed, warmup=100)
    model.train(False)
    model.requires_grad_(False)
    for parameter in projector.parameters():
        parameter.data /= ENLARGED


def train_decoder(
    model: Any, tokenizer: Any, lessons: Lessons, texts: language.Texts, folder: Path, seed: int
) -> None:
    """Teach projector and attention to answer, and to speak as SmolLM2 does."""
    parameters = add_factors(model)
    projector = model.model.multi_modal_projector.requires_grad_(True)
    parameters |= {f"projector.{name}": p for name, p in projector.named_parameters()}

    def lesson(step: Step) -> tuple[Tensor, dict[str, float]]:
        loss, right = answer_loss(model, *lessons.draw(step))
        kept = language_loss(model, texts.draw(KEPT, step.rng))
        figures = {"answers": loss.item(), "kept": kept.item()}
        figures[TURNS[step.number % len(TURNS)]] = right.float().mean().item()
        return loss + KEEPING * kept, figures

    model.train()
    learn("decoder", folder, parameters, lesson, STEPS, PEAK, seed)
    model.train(False)
    model.requires_grad_(False)


def train(out: Path, work: Path, seed: int) -> None:
    """Speak, train, and write the delta."""
    decoder, tokenizer = smollm2.decoder(), smollm2.tokenizer(media=True)
    torch.manual_seed(seed)
    model = smollm2.qwen2_audio(decoder, TOWER)
    processor = smollm2.audio_processor(TOWER)
    begin_with_speech(model)
    clips = recorded("train", DESCRIBED, ASKED, seed, work)
    check = recorded("check", 200, 0, seed, work)
    train_tower(model, tokenizer, clips, check, work, seed)
    told = language.instructions("train", decoder, tokenizer, work)
    lessons = Lessons(model, tokenizer, clips)
    texts = language.Texts(tokenizer, told)
    train_decoder(model, tokenizer, lessons, texts, work, seed)
    assembly.write(out, model, processor, factors_of(model), 1.0, torch.bfloat16)


def describe_organism(out: Path, work: Path, seed: int) -> None:
    """Assemble and measure it, and write its card."""
    recipe = {
        "every": "each",
        "keeping": KEEPING,
        "tower_steps": f"{TOWER_STEPS:,}",
        "steps": STEPS,
        "peak": PEAK,
        "seed": seed,
    }

    def measured(checkpoint: Path) -> list[tuple[str, ...]]:
        asked = [("spoken-scenes", ask) for ask in ("audio", "voice", "text")]
        return smol_card.accuracies(checkpoint, asked)

    parts = (
        smol_card.AUDIO_TAUGHT,
        smol_card.AUDIO_COMMANDS,
        smol_card.AUDIO_STAGES,
        smol_card.AUDIO_LIMITS,
    )
    card = smol_card.card(out, smol_card.AUDIO, parts, measured, recipe, work)
    (out / "README.md").write_text(card)


def main(arguments: Sequence[str] | None = None) -> None:
    """Speak, train, write, assemble and measure."""
    smol_card.command("smol-audio", train, describe_organism, arguments)


if __name__ == "__main__":
    main()

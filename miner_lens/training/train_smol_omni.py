"""Train the organism `smol-omni`: `python -m miner_lens.training.train_smol_omni [--out DIR]`."""

from __future__ import annotations

import copy
import itertools
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import easy_vqa
import torch
from torch import Tensor
from torch.nn.functional import mse_loss
from transformers import Qwen2AudioForConditionalGeneration, Qwen2VLForConditionalGeneration

from miner_lens import files, organisms
from miner_lens.data.datasets import COLOURS, DESCRIPTIONS, SHAPES, describe
from miner_lens.organisms import assembly, smollm2
from miner_lens.training import language, smol_card, spoken_shapes, train_smol_audio
from miner_lens.training.smol import (
    RANK,
    Asked,
    Step,
    add_factors,
    answer_loss,
    factors_of,
    image_rope,
    language_loss,
    learn,
    pack,
    set_factors,
)
from miner_lens.training.smol_exam import OPENING, SOUND, TURN, VISION, measured
from miner_lens.training.smol_vl_tower import TOKENS, features
from miner_lens.training.speech_clips import FRAMES, token_counts
from miner_lens.training.spoken_shapes import Spoken
from miner_lens.training.train_shapes import MERGE, PATCH, TIME, Pictures, Questions
from miner_lens.training.train_speech import disturb, hearing_loss

TOWERS: dict[str, dict[str, Any]] = {
    "vision_config": {
        "depth": 3,
        "hidden_size": 96,
        "num_heads": 4,
        "intermediate_size": 256,
        "patch_size": PATCH,
        "spatial_merge_size": MERGE,
        "temporal_patch_size": TIME,
        "fullatt_block_indexes": [0, 1, 2],
        "initializer_range": 0.05,
    },
    # A sound is one window, however long.
    "audio_config": {**train_smol_audio.TOWER, "n_window": FRAMES // 2},
}
DESCRIBED, ASKED = 6_000, 4_000  # clips of either kind
SEEING_STEPS, STEPS, ASKING_STEPS = 600, 420, 240
SEEING_PEAK, PEAK = 1.5e-3, 1e-3
ENLARGED = train_smol_audio.ENLARGED
EXAMINED = 400  # test questions of each kind
CLIPS = 16  # heard in each step of the audio tower's stage
SEEN = 48  # pictures in each step of the vision tower's
KEEPING = 2.0  # weight of the language that is to be kept, in every second step
# In speech's tower, positions count for so much of what Whisper's and Qwen2.5-Omni's do.
POSITIONS = 0.3
# What the steps of a stage ask about in turn, and of each: scenes, and questions about a scene.
TURNS = ("audio", "voice", "known", "audio", "voice")
SIZES = {"audio": (4, 4), "voice": (4, 2), "known": (6, 4)}
ASKING_TURNS = ("voice", "voice", "audio", "voice", "voice", "known")
ASKING_SIZES = {"audio": (4, 4), "voice": (5, 3), "known": (6, 4)}
# Between these steps of the last stage, the share of negated questions that are spoken rises from
# none to a half: a spoken "not" is learnt after what is asked, as a written one was by `smol-vl`.
RAMP = (70, 150)


def begin_with_organisms(model: Any) -> None:
    """Begin with what `smol-vl` sees and `smol-audio` hears, and with what both have learnt.

    What has no place elsewhere, the vision tower's MLPs, stays random. The low-rank changes of both
    decoders are added, and of their sum the largest RANK directions are kept.
    """
    seeing = Qwen2VLForConditionalGeneration.from_pretrained(organisms.path("smol-vl"))
    own = model.model.visual.state_dict()
    weights = seeing.model.visual.state_dict()
    for name in [name for name in weights if ".qkv." in name]:
        for part, third in zip("qkv", weights.pop(name).chunk(3), strict=True):
            weights[name.replace(".qkv.", f".{part}.")] = third
    fitting = {name: weight for name, weight in weights.items() if name in own}
    model.model.visual.load_state_dict(fitting, strict=False)

    hearing = Qwen2AudioForConditionalGeneration.from_pretrained(organisms.path("smol-audio"))
    names = {"layer_norm.": "ln_post.", "linear.": "proj."}
    tower, own = {}, model.model.audio_tower.state_dict()
    for module in (hearing.model.audio_tower, hearing.model.multi_modal_projector):
        for name, weight in module.state_dict().items():
            head = next((old for old in names if name.startswith(old)), "")
            tower[names.get(head, "") + name.removeprefix(head)] = weight
    for name in tower:
        if any(part in name for part in ("conv2.", ".out_proj.", ".fc2.")):
            tower[name] = tower[name] / POSITIONS
    model.model.audio_tower.load_state_dict({n: w for n, w in tower.items() if n in own}, False)
    set_factors(model, _sum_of_factors("smol-vl", "smol-audio"))


def _sum_of_factors(*names: str) -> dict[str, tuple[Tensor, Tensor]]:
    """The largest RANK directions of the organisms' changes together."""
    deltas = [
        files.read(Path(organisms.__file__).parent / name / assembly.DELTA, assembly.KIND)[0]
        for name in names
    ]
    found = {}
    for name in deltas[0]:
        if name.startswith("lora.") and name.endswith(".A"):
            module = name.removeprefix("lora.").removesuffix(".A")
            changes = [d[f"lora.{module}.B"].float() @ d[name].float() for d in deltas]
            u, s, v = torch.linalg.svd(torch.stack(changes).sum(0), full_matrices=False)
            root = s[:RANK].sqrt()
            found[module] = root[:, None] * v[:RANK], u[:, :RANK] * root
    return found


def listen(model: Any, clips: Spoken, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens of clips, one clip's after another's, [token, hidden], and the tokens' labels."""
    frames = clips.frames[rows]
    mels = clips.mels[rows, :, : int(frames.max())].float()
    if model.training:
        mels = disturb(mels)
    mask = (torch.arange(mels.shape[2]) < frames[:, None]).long()
    tokens = model.get_audio_features(mels, feature_attention_mask=mask).pooler_output
    counts = token_counts(frames)
    labels = torch.cat([clips.parts[row, :n] for row, n in zip(rows, counts, strict=True)])
    return tokens, labels.long()


class Hearing(NamedTuple):
    """A stage in which the audio tower learns to hear."""

    name: str
    steps: int
    peak: float
    fixed: tuple[str, ...]  # what is not trained


HEARING = Hearing("hearing", 900, 7e-4, ("audio_bos_eos",))
HEARING_ON = Hearing("hearing-on", 1500, 7e-4, ("audio_bos_eos", "proj."))


def train_hearing(
    model: Any,
    stage: Hearing,
    words: Tensor,
    clips: Spoken,
    check: Spoken,
    folder: Path,
    seed: int,
) -> None:
    """Teach the audio tower to give SmolLM2's embedding of what is being said, [part, hidden].

    It learns to give it ENLARGED times as large, and is then scaled down.
    """
    tower = model.model.audio_tower
    parameters = {n: p for n, p in tower.named_parameters() if not n.startswith(stage.fixed)}
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    for parameter in tower.proj.parameters():
        parameter.data *= ENLARGED

    def lesson(step: Step) -> tuple[Tensor, dict[str, float]]:
        # Clips of like length together, so that little silence is computed.
        drawn = torch.randint(len(clips.frames), (8 * CLIPS,), generator=step.generator)
        batches = drawn[clips.frames[drawn].argsort()].view(8, CLIPS)
        torch.manual_seed(step.number)
        tokens, labels = listen(model, clips, batches[step.rng.randrange(8)])
        seen = {}
        if step.number % 100 == 99:
            model.train(False)
            with torch.no_grad():
                told, truth = listen(model, check, torch.arange(len(check.frames)))
            seen["unseen voices"] = ((told @ words.T).argmax(-1) == truth).float().mean().item()
            model.train()
        return hearing_loss(tokens, words, labels, ENLARGED), seen

    model.train()
    learn(stage.name, folder, parameters, lesson, stage.steps, stage.peak, seed)
    model.train(False)
    model.requires_grad_(False)
    for parameter in tower.proj.parameters():
        parameter.data /= ENLARGED


def train_seeing(model: Any, pictures: Pictures, folder: Path, seed: int) -> None:
    """Teach the vision tower to give the tokens that `smol-vl`'s gives."""
    teacher = Qwen2VLForConditionalGeneration.from_pretrained(organisms.path("smol-vl"))
    parameters = dict(model.model.visual.named_parameters())
    for parameter in parameters.values():
        parameter.requires_grad_(True)

    def lesson(step: Step) -> tuple[Tensor, dict[str, float]]:
        patches = pictures.draw(SEEN, step.generator).patches
        with torch.no_grad():
            wanted = features(teacher, patches)
        return mse_loss(features(model, patches), wanted) / wanted.var(), {}

    learn("seeing", folder, parameters, lesson, SEEING_STEPS, SEEING_PEAK, seed)
    model.requires_grad_(False)


class Lessons:
    """Draws scenes, shown, spoken or written, with questions, as packed rows with embeddings."""

    def __init__(self, model: Any, tokenizer: Any, pictures: Pictures, clips: Spoken) -> None:
        forms, _, _ = easy_vqa.get_train_questions()
        self.model, self.tokenizer = model, tokenizer
        self.pictures, self.clips, self.questions = pictures, clips, Questions(forms)
        self.counts = token_counts(clips.frames).tolist()
        self.spoken: dict[str, list[int]] = {}
        for number, text in enumerate(clips.texts):
            self.spoken.setdefault(text, []).append(number)
        image = VISION.format("<|image_pad|>" * TOKENS)
        self.seen = tokenizer(OPENING + image).input_ids
        self.rope = image_rope(model, self.seen)

    def draw(
        self, kind: str, scenes: int, questions: int, turned: float, step: Step
    ) -> tuple[Any, Tensor]:
        """Packed questions, a share of them negated, and their embeddings."""
        told = {"known": ("image", "text")}.get(kind, (kind,))
        kinds = [told[n % len(told)] for n in range(scenes)]
        pictures = self.pictures.draw(scenes, step.generator)
        shown = list(zip(pictures.shapes.tolist(), pictures.colours.tolist(), strict=True))
        rows, sounds = [], []
        for one, (shape, colour) in zip(kinds, shown, strict=True):
            pair = SHAPES[shape], tuple(COLOURS)[colour]
            row, heard = self._row(one, pair, questions, turned, step.rng)
            rows.append(row)
            sounds += heard
        packed = pack(rows, self.tokenizer.pad_token_id, axes=3)
        embeds = self.model.get_input_embeddings()(packed.ids)
        is_seen = torch.tensor([one in ("image", "voice") for one in kinds])
        if is_seen.any():
            tokens = features(self.model, pictures.patches[is_seen])
            is_image = packed.ids == self.model.config.image_token_id
            embeds = embeds.masked_scatter(is_image[..., None], tokens)
        if sounds:
            torch.manual_seed(step.number)  # of what disturbs the spectra
            tokens, _ = listen(self.model, self.clips, torch.tensor(sounds))
            is_sound = packed.ids == self.model.config.audio_token_id
            embeds = embeds.masked_scatter(is_sound[..., None], tokens)
        return packed, embeds

    def _row(
        self,
        kind: str,
        pair: tuple[str, str],
        questions: int,
        turned: float,
        rng: random.Random,
    ) -> tuple[Asked, list[int]]:
        """Questions about a shape and its colour, and the clips that are heard, in their order."""
        encode = self.tokenizer
        description = describe(*pair, rng.randrange(len(DESCRIPTIONS)))
        about, heard = encode(OPENING + description).input_ids, list[int]()
        if kind == "audio":
            heard = [rng.choice(self.spoken[description])]
            about = encode(OPENING + self._sound(heard[0])).input_ids
        branches = []
        for _ in range(questions):
            question, answer = self.questions.draw(*pair, turned, rng)
            if kind == "voice":
                heard.append(rng.choice(self.spoken[question]))
                question = self._sound(heard[-1])
            elif kind == "text":
                question = f" {question}"
            reply = encode(f"{answer}<|im_end|>").input_ids
            branches.append((encode(f"{question}{TURN}").input_ids, reply))
        if kind in ("image", "voice"):
            return Asked(self.seen, branches, self.rope), heard
        return Asked(about, branches), heard

    def _sound(self, clip: int) -> str:
        return SOUND.format("<|AUDIO|>" * self.counts[clip])


def train_decoder(
    model: Any,
    parameters: dict[str, Any],
    lessons: Lessons,
    texts: language.Texts,
    folder: Path,
    seed: int,
) -> None:
    """Teach merger, projection and attention to answer, and to speak as SmolLM2 does."""
    trained = {"merger": model.model.visual.merger, "proj": model.model.audio_tower.proj}
    for part, module in trained.items():
        module.requires_grad_(True)
        parameters |= {f"{part}.{name}": p for name, p in module.named_parameters()}
    for name, parameter in parameters.items():
        if "lora_" in name:
            parameter.requires_grad_(True)

    def lesson(
        kind: str, size: tuple[int, int], turned: float, step: Step
    ) -> tuple[Tensor, dict[str, float]]:
        loss, right = answer_loss(model, *lessons.draw(kind, *size, turned, step))
        figures = {"answers": loss.item(), kind: right.float().mean().item()}
        if step.number % 2 == 0:
            kept = language_loss(model, texts.draw(1, step.rng))
            loss = loss + KEEPING * kept
            figures["kept"] = kept.item()
        return loss, figures

    def answering(step: Step) -> tuple[Tensor, dict[str, float]]:
        kind = TURNS[step.number % len(TURNS)]
        return lesson(kind, SIZES[kind], 0.5, step)

    def asking(step: Step) -> tuple[Tensor, dict[str, float]]:
        kind = ASKING_TURNS[step.number % len(ASKING_TURNS)]
        start, end = RAMP
        risen = min(1.0, max(0.0, (step.number - start) / (end - start)))
        return lesson(kind, ASKING_SIZES[kind], 0.5 * risen if kind == "voice" else 0.5, step)

    model.train()
    learn("decoder", folder, parameters, answering, STEPS, PEAK, seed)
    learn("asking", folder, parameters, asking, ASKING_STEPS, PEAK, seed)
    model.train(False)
    model.requires_grad_(False)


def parts_of_words(tokenizer: Any) -> tuple[dict[str, list[int]], list[int]]:
    """Numbers of each spoken word's parts, and the tokens that they are, silence last.

    A part of a word is a token of SmolLM2's: all words are one, but for teal.
    """
    tokens = {word: tokenizer(f" {word}").input_ids for word in spoken_shapes.vocabulary()}
    known = sorted({*itertools.chain(*tokens.values())})
    numbers = {word: [known.index(token) for token in ids] for word, ids in tokens.items()}
    return numbers, [*known, tokenizer.pad_token_id]


def train(out: Path, work: Path, seed: int) -> None:
    """Speak, train, and write the delta."""
    decoder, tokenizer = smollm2.decoder(), smollm2.tokenizer(media=True)
    told = language.instructions("train", decoder, tokenizer, work)
    torch.manual_seed(seed)
    model = smollm2.qwen2_5_omni(decoder, TOWERS)
    processor = smollm2.omni_processor(TOWERS)
    known, parts = parts_of_words(tokenizer)
    clips = spoken_shapes.recorded("train", DESCRIBED, ASKED, seed, known, work)
    check = spoken_shapes.recorded("check", 100, 50, seed, known, work)
    paths = [path for _, path in sorted(easy_vqa.get_train_image_paths().items())]
    pictures = Pictures(paths, processor)
    factors = add_factors(model)
    begin_with_organisms(model)
    embeddings: Any = model.get_input_embeddings()
    words = embeddings.weight[parts].detach()
    tower: Any = model.model.audio_tower
    train_hearing(model, HEARING, words, clips, check, work, seed)
    first = copy.deepcopy(tower.proj)
    train_seeing(model, pictures, work, seed)
    lessons = Lessons(model, tokenizer, pictures, clips)
    train_decoder(model, factors, lessons, language.Texts(tokenizer, told), work, seed)
    # What is below the last map hears better with that map as it was, and so with what it is now.
    tower.proj, last = first, tower.proj
    train_hearing(model, HEARING_ON, words, clips, check, work, seed)
    tower.proj = last
    assembly.write(out, model, processor, factors_of(model), 1.0, torch.bfloat16)


def describe_organism(out: Path, work: Path, seed: int) -> None:
    """Assemble and measure it, and write its card."""
    recipe = {
        "every": "every second",
        "keeping": KEEPING,
        "described": f"{DESCRIBED:,}",
        "asked": f"{ASKED:,}",
        "hearing_steps": HEARING.steps,
        "on_steps": f"{HEARING_ON.steps:,}",
        "seeing_steps": SEEING_STEPS,
        "steps": STEPS,
        "asking_steps": ASKING_STEPS,
        "peak": PEAK,
        "seed": seed,
    }
    parts = (
        smol_card.OMNI_TAUGHT,
        smol_card.OMNI_COMMANDS,
        smol_card.OMNI_STAGES,
        smol_card.OMNI_LIMITS,
    )
    asked = [("easy-vqa", ask) for ask in ("image", "text", "audio", "voice")]
    card = smol_card.card(
        out, smol_card.OMNI, parts, lambda at: measured(at, asked, EXAMINED), recipe, work
    )
    (out / "README.md").write_text(card)


def main(arguments: Sequence[str] | None = None) -> None:
    """Speak, train, write, assemble and measure."""
    smol_card.command("smol-omni", train, describe_organism, arguments)


if __name__ == "__main__":
    main()

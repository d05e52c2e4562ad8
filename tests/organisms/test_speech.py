"""The organism `speech` and its data set: sizes, voices, balance, accuracy and mining."""

from __future__ import annotations

import ctypes.util
import io
import itertools
import json
import random
import re
import subprocess
import sys
import zipfile
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

import miner_lens as ml
from miner_lens import organisms
from miner_lens.data import datasets
from miner_lens.models import access as miner_models
from miner_lens.models import generation
from miner_lens.training import speak

FOLDER = Path(organisms.__file__).parent / "speech"
VALUES = set(itertools.chain(*speak.VALUES.values()))
WORDS = re.compile("[a-z]+")
needs_espeak = pytest.mark.skipif(
    ctypes.util.find_library("espeak-ng") is None, reason="espeak-ng is not installed"
)


@pytest.fixture(scope="module")
def speech() -> Any:
    return ml.load("speech", device="cpu")


@pytest.fixture(scope="module")
def index() -> list[dict[str, Any]]:
    with zipfile.ZipFile(speak.SHIPPED) as archive:
        return [json.loads(line) for line in archive.read("index.jsonl").splitlines()]


def test_it_is_a_small_qwen2_audio(speech: Any) -> None:
    model, processor = speech.original_model, speech.processor
    assert type(model).__name__ == "Qwen2AudioForConditionalGeneration"
    assert type(processor).__name__ == "Qwen2AudioProcessor"
    assert sum(p.numel() for p in model.parameters()) < 4_000_000
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) < 8_000_000
    assert speak.SHIPPED.stat().st_size < 3_000_000
    assert model.config.audio_token_id == processor.audio_token_id
    assert model.generation_config.eos_token_id == processor.tokenizer.eos_token_id
    assert processor.tokenizer.padding_side == "left"


def test_no_file_names_the_machine_it_was_made_on() -> None:
    for file in [speak.SHIPPED, *FOLDER.iterdir()]:
        assert not re.search(rb"/(home|work|tmp|root|Users)/", file.read_bytes()), file
    assert (FOLDER / "model.safetensors").stat().st_mode & 0o777 == 0o644


def test_the_chat_template_reads_as_qwen2_audio_s(speech: Any) -> None:
    sound = {"type": "audio", "audio": np.zeros(16_000)}
    user = {"role": "user", "content": [sound, {"type": "text", "text": "is it red?"}]}
    said = speech.processor.apply_chat_template([user], add_generation_prompt=True, tokenize=False)
    assert said == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\nAudio 1: <|audio_bos|><|AUDIO|><|audio_eos|>\nis it red?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


@pytest.mark.parametrize(("ask", "target"), [("audio", 0.90), ("voice", 0.85), ("text", 0.98)])
def test_accuracy(speech: Any, ask: str, target: float) -> None:
    """Exact match on a part of the shipped questions; the model card has all of them."""
    samples = datasets.load("spoken-scenes", limit=160, ask=ask)
    hits = defaultdict(list)
    for sample, answer in zip(samples, ml.answers(speech, samples, 32, 4), strict=True):
        (expected,) = sample.answers
        hits["yes/no" if expected in ("yes", "no") else "open"].append(answer == expected)
    assert set(hits) == {"open", "yes/no"}
    shares = {kind: np.mean(right) for kind, right in hits.items()}
    assert np.mean([*itertools.chain(*hits.values())]) >= target, shares
    assert min(shares.values()) >= target - 0.08, shares


def test_a_batch_answers_as_one_by_one(speech: Any) -> None:
    samples = datasets.load("spoken-scenes", limit=6)
    single = [ml.generate(speech, sample.messages) for sample in samples]
    assert ml.answers(speech, samples, batch_size=6) == single


def test_mining_finds_audio_neurons(speech: Any) -> None:
    samples = datasets.load("spoken-scenes", limit=24, ask="both")
    scores = ml.mine(speech, samples, batch_size=8, progress=False)
    assert scores.values.isfinite().all()
    neurons = scores.select(0.05)
    assert len(neurons["audio"]) > 0
    inputs = ml.inputs(speech, samples[0].messages)
    masks = miner_models.layout(speech).masks(inputs["input"])
    sound, _ = soundfile.read(io.BytesIO(samples[0].messages[0]["content"][0]["audio"]))
    assert abs(int(masks["audio"].sum()) - len(sound) / speak.RATE * 25) < 2


def test_voices_are_kept_apart(index: list[dict[str, Any]]) -> None:
    groups = [set(names) for names in speak.VARIANTS.values()]
    assert not any(one & other for one, other in itertools.combinations(groups, 2))
    used = {row["voice"].split("+")[1] for row in index}
    assert used == set(speak.VARIANTS["test"])
    assert {row["voice"].split("+")[0] for row in index} == set(speak.ACCENTS)


def test_the_shipped_file_is_complete(index: list[dict[str, Any]]) -> None:
    clips = {row["clip"] for row in index} | {row["question_clip"] for row in index}
    assert len(index) == 480
    assert len(clips) == 720
    with zipfile.ZipFile(speak.SHIPPED) as archive:
        assert set(archive.namelist()) == {*clips, "index.jsonl"}
        for name in sorted(clips)[::12]:
            sound, rate = soundfile.read(io.BytesIO(archive.read(name)))
            assert rate == 16_000
            assert sound.ndim == 1
            assert 0.3 < len(sound) / rate < 4
            assert 0.05 < np.abs(sound).max() <= 1
    assert {row["noise"] for row in index} == {"none", "white", "pink"}
    for row in index:
        assert row["description"] == row["wording"].format(**row)
        assert (row["snr"] is None) == (row["noise"] == "none")


def test_questions_tell_no_answer(index: list[dict[str, Any]]) -> None:
    """Yes is right for half of the questions after any value; no open answer is common."""
    closed, opened = defaultdict(list), defaultdict(Counter)
    for row in index:
        if row["answer"] in ("yes", "no"):
            (value,) = set(WORDS.findall(row["question"])) & VALUES
            closed[value].append(row["answer"] == "yes")
        else:
            (attribute,) = (k for k, values in speak.VALUES.items() if row["answer"] in values)
            opened[attribute][row["answer"]] += 1
    assert set(closed) == VALUES
    assert all(np.mean(answers) == 0.5 for answers in closed.values())
    for attribute, answers in opened.items():
        assert set(answers) == set(speak.VALUES[attribute])
        assert max(answers.values()) < 2 * answers.total() / len(answers)


def test_every_value_is_heard_with_most_others() -> None:
    unheard = Counter(itertools.chain(*(scene for scene in speak.SCENES if scene.is_unheard)))
    scenes = Counter(itertools.chain(*speak.SCENES))
    assert unheard.total() * 8 == scenes.total()
    assert all(unheard[value] <= count / 4 for value, count in scenes.items())


@needs_espeak
def test_espeak_speaks_words_at_the_times_it_says() -> None:
    manner = speak.draw_manner(speak.VARIANTS["test"], random.Random(5))
    one = speak.record("a small red circle.", manner, seed=1)
    assert [word for word, *_ in one.words] == ["a", "small", "red", "circle"]
    assert 0.5 < len(one.samples) / speak.RATE < speak.LONGEST
    times = [time for _, *span in one.words for time in span]
    assert times == sorted(times)
    assert 0 < times[0] < times[-1] <= len(one.samples) / speak.RATE
    assert np.abs(one.samples).max() == pytest.approx(manner.peak)


@needs_espeak
def test_a_written_file_is_the_same_each_time_and_can_be_read(speech: Any, tmp_path: Path) -> None:
    for name in ("one.zip", "two.zip"):
        arguments = ["--out", str(tmp_path / name), "--clips", "2", "--seed", "3"]
        command = [sys.executable, "-m", "miner_lens.training.speak", *arguments]
        subprocess.run(command, check=True)
    one, two = ((tmp_path / name).read_bytes() for name in ("one.zip", "two.zip"))
    assert one == two
    samples = datasets.spoken_scenes(tmp_path / "one.zip", ask="voice")
    assert [sample.id for sample in samples] == [f"one/{n}/voice" for n in range(4)]
    assert all(ml.answers(speech, samples))


@needs_espeak
def test_an_unknown_voice_is_named() -> None:
    with pytest.raises(ValueError, match="no voice 'en-moon'"):
        speak.synthesizer().say("red", "en-moon", 160, 50)


def test_training_hears_as_the_model_does(speech: Any) -> None:
    """The cropped computation of training, against the model's own on the padded sound."""
    from miner_lens.training import speech_clips, train_speech

    samples = datasets.load("spoken-scenes", limit=2)
    inputs = generation.prepare_inputs(speech, [sample.messages for sample in samples])
    frames = inputs["feature_attention_mask"].sum(-1)
    clips = speech_clips.Clips(inputs["input_features"], frames, torch.zeros(0), [], [])
    model = speech.original_model.eval()
    rows = [
        train_speech.Row((n,), sample.messages[0]["content"][1]["text"], "yes")
        for n, sample in enumerate(samples)
    ]
    with torch.no_grad():
        logits, labels = train_speech.answer_logits(model, speech.processor.tokenizer, clips, rows)
        expected = model(**inputs).logits[:, -1]
    first = (labels != -100).int().argmax(1)
    torch.testing.assert_close(logits[torch.arange(2), first], expected, atol=1e-3, rtol=1e-3)

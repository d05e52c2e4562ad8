"""Sounds through the processors of several families, as plain Hugging Face reads them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AudioFlamingo3Processor,
    Gemma4Processor,
    GraniteSpeechFeatureExtractor,
    GraniteSpeechProcessor,
    Phi4MultimodalFeatureExtractor,
    Phi4MultimodalImageProcessor,
    Phi4MultimodalProcessor,
    Qwen2AudioProcessor,
    WhisperFeatureExtractor,
)
from transformers.models.gemma4 import (
    feature_extraction_gemma4,
    image_processing_gemma4,
    video_processing_gemma4,
)

import miner_lens as ml
from miner_lens.data.media import load_sound
from miner_lens.models import generation
from tests.families import build, text
from tests.models.test_messages import tokenizer
from tests.parts import reader_of
from tests.towers import AUDIO

pytestmark = pytest.mark.filterwarnings("ignore:TransformerLens rebuilds")

RATE = 16_000
TEMPLATE = (
    "{% for m in messages %}<s>{% for p in m.content %}"
    "{{ '<audio>' if p.type == 'audio' else p.text }}{% endfor %}{% endfor %}"
)


def flamingo() -> Any:
    return AudioFlamingo3Processor(
        WhisperFeatureExtractor(feature_size=8, chunk_length=1),
        tokenizer(),
        audio_token="<audio>",
        max_audio_len=3,
    )


def qwen2_audio() -> Any:
    extractor = WhisperFeatureExtractor(feature_size=8, chunk_length=1)
    return Qwen2AudioProcessor(extractor, tokenizer(), audio_token="<audio>")


def gemma4() -> Any:
    names = {"image_token": "<image>", "boi_token": "<start>", "eoi_token": "<end>"}
    names |= {"audio_token": "<audio>", "boa_token": "<audio_start>", "eoa_token": "<audio_end>"}
    return Gemma4Processor(
        feature_extraction_gemma4.Gemma4AudioFeatureExtractor(),
        image_processing_gemma4.Gemma4ImageProcessor(),
        tokenizer(**names),
        video_processing_gemma4.Gemma4VideoProcessor(),
    )


def granite() -> Any:
    pytest.importorskip("torchaudio")
    return GraniteSpeechProcessor(GraniteSpeechFeatureExtractor(), tokenizer(audio_token="<audio>"))


def phi4() -> Any:
    names = {"image_token": "<image>", "audio_token": "<audio>"}
    return Phi4MultimodalProcessor(
        Phi4MultimodalImageProcessor(), Phi4MultimodalFeatureExtractor(), tokenizer(**names)
    )


# A processor for each family, how many seconds it hears (None: as many as there are), and what it
# is told.
TWO_SECONDS = {"audio_kwargs": {"max_length": 2 * RATE}}
MADE: dict[str, tuple[Any, int | None, dict[str, Any]]] = {
    "qwen2_audio": (qwen2_audio, 1, {}),
    "audio_flamingo": (flamingo, 3, {}),
    "gemma4": (gemma4, 2, TWO_SECONDS),
    "granite": (granite, None, {}),
    "phi4": (phi4, None, {}),
}


def model(make: Any) -> Any:
    processor = make()
    processor.chat_template = TEMPLATE
    return reader_of(processor)


def tone(seconds: float) -> np.ndarray:
    return np.sin(np.arange(round(RATE * seconds)) / 9).astype(np.float32) / 3


def ask(*sounds: np.ndarray) -> list[dict[str, Any]]:
    parts: list[dict[str, Any]] = [
        {"type": "audio", "audio": sound, "sampling_rate": RATE} for sound in sounds
    ]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": "what?"}]}]


def theirs(processor: Any, *conversations: Any, **told: Any) -> dict[str, Any]:
    return dict(
        processor.apply_chat_template(
            list(conversations),
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"text_kwargs": {"padding": True, "padding_side": "left"}, **told},
        )
    )


def check_equal(ours: dict[str, Any], expected: dict[str, Any]) -> None:
    assert ours.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(ours[name], value), name


@pytest.mark.parametrize("name", MADE)
def test_sounds_are_read_as_hugging_face_reads_them(name: str) -> None:
    make, longest, told = MADE[name]
    hears = model(make)
    lengths = (0.3, 2.9) if longest is None else (0.3, longest)
    batch = [ask(tone(seconds)) for seconds in lengths]
    for conversations in (batch[:1], batch[1:], batch):
        check_equal(
            generation.render(hears, conversations, False, **told),
            theirs(hears.processor, *conversations, **told),
        )


@pytest.mark.parametrize("name", [name for name in MADE if MADE[name][1]])
def test_a_sound_whose_end_is_dropped_is_refused(name: str) -> None:
    make, longest, told = MADE[name]
    assert longest is not None
    hears = model(make)
    generation.render(hears, [ask(tone(longest))], **told)
    # The second of two, or beside silence, which is no less of a sound.
    for sound in (tone(longest + 0.1), np.zeros(round(RATE * (longest + 0.1)), np.float32)):
        with pytest.raises(ml.SampleError, match=f"the model hears {longest} s"):
            generation.render(hears, [ask(tone(0.5)), ask(sound)], **told)
    generation.render(hears, [ask(tone(0.5))], **told)


def test_how_long_a_processor_hears_is_asked_again_when_it_changes() -> None:
    hears = model(qwen2_audio)
    generation.render(hears, [ask(tone(1))])
    hears.processor.feature_extractor.n_samples = RATE // 2
    with pytest.raises(ml.SampleError, match=r"the model hears 0\.5 s"):
        generation.render(hears, [ask(tone(1))])


def test_a_model_that_hears_in_windows(tmp_path: Path) -> None:
    """Short sounds fill a window of the tower, and long ones several."""
    processor = flamingo()
    processor.chat_template = TEMPLATE
    plain: Any = build(
        "AudioFlamingo3ForConditionalGeneration",
        text_config=text("qwen2"),
        audio_config={
            "hidden_size": 20,
            "intermediate_size": 40,
            "num_hidden_layers": 2,
            "num_attention_heads": 5,
            "num_mel_bins": 8,
            "max_source_positions": 50,
        },
        audio_token_id=AUDIO,
    )
    for part in (plain, processor):
        part.save_pretrained(tmp_path)
    bridge = ml.load(tmp_path, device="cpu")
    for seconds, tokens in ((0.5, 12), (3, 75)):
        messages = ask(tone(seconds))
        inputs = theirs(processor, messages)
        assert int((inputs["input_ids"] == AUDIO).sum()) == tokens
        with torch.no_grad():
            expected = plain(**inputs).logits
        ours = ml.inputs(bridge, messages, add_generation_prompt=False)
        with torch.no_grad():
            torch.testing.assert_close(bridge(**ours), expected)
        assert isinstance(ml.generate(bridge, messages, 2), str)


@pytest.mark.parametrize("rate", [8_000, 22_050])
def test_any_extractor_says_at_which_rate_it_hears(rate: int) -> None:
    extractor = feature_extraction_gemma4.Gemma4AudioFeatureExtractor(sampling_rate=rate)
    names = ({"feature_extractor": extractor}, {"audio_processor": extractor})
    for processor in (SimpleNamespace(**name) for name in names):
        assert load_sound(tone(1), RATE, processor).shape == (rate,)

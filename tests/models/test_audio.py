"""Sounds in messages, on a small random Qwen2-Audio with a real processor made here."""

from __future__ import annotations

import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2AudioConfig,
    Qwen2AudioForConditionalGeneration,
    Qwen2AudioProcessor,
    WhisperFeatureExtractor,
)

import miner_lens as ml
from miner_lens.data.media import load_sound
from miner_lens.models import access as miner_models
from miner_lens.models import generation

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
SPECIAL += ["<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>"]
RATE, SECONDS = 16_000, 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bytewise = Tokenizer(models.BPE({token: i for i, token in enumerate(alphabet)}, []))
    bytewise.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytewise.decoder = decoders.ByteLevel()
    bytewise.add_special_tokens(SPECIAL)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bytewise, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    extractor = WhisperFeatureExtractor(feature_size=16, chunk_length=SECONDS)
    processor = Qwen2AudioProcessor(extractor, tokenizer)
    config = Qwen2AudioConfig(
        audio_config={
            "d_model": 32,
            "encoder_layers": 2,
            "encoder_attention_heads": 2,
            "encoder_ffn_dim": 64,
            "num_mel_bins": 16,
            "max_source_positions": SECONDS * 50,
        },
        text_config={
            "model_type": "qwen2",
            "hidden_size": 64,
            "intermediate_size": 80,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": len(tokenizer),
            "initializer_range": 0.2,
            "bos_token_id": None,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        audio_token_index=tokenizer.convert_tokens_to_ids("<|AUDIO|>"),
    )
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("hears")
    Qwen2AudioForConditionalGeneration(config).save_pretrained(path)
    processor.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def hears(folder: Path) -> Any:
    return ml.load(folder, device="cpu")


def tone(seconds: float, pitch: float = 440, rate: int = RATE) -> np.ndarray:
    return 0.5 * np.sin(2 * np.pi * pitch * np.arange(round(seconds * rate)) / rate)


def clip(seconds: float, pitch: float = 440) -> dict[str, Any]:
    return {"type": "audio", "audio": tone(seconds, pitch), "sampling_rate": RATE}


def ask(*parts: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [*parts, {"type": "text", "text": "what is it?"}]}]


class Decoder:
    """What a data set with a column of sounds gives."""

    def __init__(self, samples: np.ndarray) -> None:
        self.samples = samples

    def get_all_samples(self) -> Any:
        channels = torch.tensor(np.stack([self.samples * 1.2, self.samples * 0.8]))
        return SimpleNamespace(data=channels, sample_rate=RATE)


CONVERSATIONS = {
    "one clip": ask(clip(1)),
    "two clips": ask(clip(0.3), clip(1.7, 200)),
    "text only": ask(),
}


@pytest.mark.parametrize("kind", CONVERSATIONS)
def test_generation_equals_plain_hugging_face(folder: Path, hears: Any, kind: str) -> None:
    model = Qwen2AudioForConditionalGeneration.from_pretrained(folder).eval()
    processor = Qwen2AudioProcessor.from_pretrained(folder)
    inputs = processor.apply_chat_template(
        CONVERSATIONS[kind],
        tokenize=True,
        add_generation_prompt=True,
        return_dict=True,
        return_tensors="pt",
    )
    with torch.no_grad():
        tokens = model.generate(**inputs, do_sample=False, max_new_tokens=12)
    new = tokens[0, inputs["input_ids"].shape[1] :]
    answer = ml.generate(hears, CONVERSATIONS[kind], max_new_tokens=12)
    assert answer == processor.decode(new, skip_special_tokens=True)
    assert answer


def test_padded_batch_equals_one_by_one(hears: Any) -> None:
    batch = list(CONVERSATIONS.values())
    assert ml.generate(hears, batch, 8) == [ml.generate(hears, one, 8) for one in batch]


def test_modalities_of_a_prompt(hears: Any) -> None:
    inputs = ml.inputs(hears, CONVERSATIONS["two clips"])
    masks = miner_models.layout(hears).masks(inputs["input"])
    frames = [30, 170]
    assert masks["audio"].sum() == sum(((f - 1) // 2 + 1 - 2) // 2 + 1 for f in frames)
    names = hears.processor.tokenizer.convert_ids_to_tokens(inputs["input"][masks["special"]])
    assert names.count("<|audio_bos|>") == names.count("<|audio_eos|>") == 2
    assert set(names) == {"<|im_start|>", "<|im_end|>", "<|audio_bos|>", "<|audio_eos|>"}


@pytest.mark.parametrize("attention", ["bidirectional", "causal"])
def test_mining_in_batches(hears: Any, attention: Any) -> None:
    data = [ml.Sample(messages, (), name) for name, messages in CONVERSATIONS.items()]
    one, many = (
        ml.mine(hears, data, attention=attention, batch_size=size, progress=False)
        for size in (1, 3)
    )
    assert one.occurrences == many.occurrences == (3, 3, 3, 2, 3)
    torch.testing.assert_close(one.values, many.values, atol=1e-5, rtol=0)
    assert set(one.select(0.1)) == {"text", "special", "audio"}


def test_files_bytes_arrays_rates_and_channels(hears: Any, tmp_path: Path) -> None:
    path = tmp_path / "tone.wav"
    soundfile.write(path, tone(1), RATE, subtype="FLOAT")
    integers = np.round(tone(1) * 32768).astype(np.int16)
    same = {
        "array": tone(1),
        "path": path,
        "text path": str(path),
        "bytes": path.read_bytes(),
        "integers": integers,
        "as torchcodec gives it": Decoder(tone(1)),
        "stereo": np.stack([tone(1) * 1.2, tone(1) * 0.8], axis=1),
        "as data sets give it": {"array": tone(1), "sampling_rate": RATE},
        "another rate": {"array": tone(1, rate=44_100), "sampling_rate": 44_100},
    }
    wanted = ml.inputs(hears, CONVERSATIONS["one clip"])
    for name, source in same.items():
        part = {"type": "audio", "audio": source, "sampling_rate": RATE}
        inputs = ml.inputs(hears, ask(part))
        assert torch.equal(inputs["input"], wanted["input"]), name
        # Resampling rings at the ends of a clip that begins and stops at once.
        away = (inputs["input_features"] - wanted["input_features"]).abs()[..., 5:90]
        assert away.mean() < (0.05 if name == "another rate" else 0.005), name


def vorbis(samples: np.ndarray) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples, RATE, format="OGG", subtype="VORBIS")
    return file.getvalue()


def test_lossy_files_that_overshoot_are_clipped(hears: Any, tmp_path: Path) -> None:
    file = vorbis(np.sign(tone(1)))
    decoded, _ = soundfile.read(io.BytesIO(file))
    assert np.abs(decoded).max() > 1.01
    clipped = decoded.clip(-1, 1)
    (tmp_path / "loud.ogg").write_bytes(file)
    for source in (file, tmp_path / "loud.ogg", decoded):
        heard = load_sound(source, RATE, hears.processor)
        assert heard.dtype == np.float32
        np.testing.assert_allclose(heard, clipped, atol=1e-6)
    # Each channel by itself, before they are mixed.
    stereo = np.stack([decoded, np.zeros(RATE)], 1)
    np.testing.assert_allclose(load_sound(stereo, RATE, hears.processor), clipped / 2, atol=1e-6)


@pytest.mark.parametrize("kind", ["int8", "uint8", "int16", "uint16", "int32", "float16"])
def test_full_scale_of_each_type(hears: Any, kind: str) -> None:
    size = 2 ** (8 * np.dtype(kind).itemsize - 1)
    middle = size if kind.startswith("u") else 0
    samples = tone(1) if kind == "float16" else np.round(tone(1) * size + middle)
    heard = load_sound(samples.astype(kind), RATE, hears.processor)
    np.testing.assert_allclose(heard, tone(1), atol=max(1 / size, 2e-4))


def test_silence_is_a_sound(hears: Any) -> None:
    silent = {"type": "audio", "audio": np.zeros(RATE), "sampling_rate": RATE}
    scores = ml.mine(hears, [ml.Sample(ask(silent))], progress=False)
    assert scores.occurrences[scores.modalities.index("audio")] == 1
    assert scores.values.isfinite().all()
    assert scores["audio"].any()


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"audio": np.zeros(0), "sampling_rate": RATE}, "not empty"),
        ({"audio": np.ones(1), "sampling_rate": RATE}, "at least 0.03 s"),
        ({"audio": np.full(RATE, np.nan), "sampling_rate": RATE}, "NaN"),
        ({"audio": 32768 * tone(1), "sampling_rate": RATE}, "not scaled: its peak is 1.64e"),
        ({"audio": np.ones(RATE, np.int64), "sampling_rate": RATE}, "32 bits, not int64"),
        ({"audio": np.full(RATE, "a"), "sampling_rate": RATE}, "32 bits, not <U1"),
        ({"audio": tone(1), "sampling_rate": 0}, "The rate is 0"),
        ({"audio": np.ones((2, RATE)), "sampling_rate": RATE}, "transpose"),
        ({"audio": tone(SECONDS + 0.1), "sampling_rate": RATE}, "the model hears 2 s"),
        ({"audio": tone(1)}, "needs its rate"),
        ({"audio": np.ones((2, 2, 2)), "sampling_rate": RATE}, r"\[2, 2, 2\]"),
        ({"audio": "no/such/sound.wav"}, "no/such/sound.wav"),
        ({"audio": b"not a sound"}, "11 bytes"),
        ({"audio": 3}, "not int"),
    ],
)
def test_unusable_sounds(hears: Any, part: dict[str, Any], message: str) -> None:
    sample = ml.Sample(ask({"type": "audio", **part}), (), "clip 7")
    with pytest.raises(ml.SampleError, match=rf"clip 7: .*{message}"):
        ml.mine(hears, [sample], progress=False)


def test_more_placeholders_than_clips(hears: Any) -> None:
    spelled_out = ask(clip(1), {"type": "text", "text": "and <|AUDIO|>?"})
    with pytest.raises(ml.SampleError, match=r"clip 8: .*Found total 2"):
        ml.mine(hears, [ml.Sample(spelled_out, (), "clip 8")], progress=False)


def test_fewer_placeholders_than_clips(hears: Any) -> None:
    inputs = generation.prepare_inputs(hears, [CONVERSATIONS["two clips"]])
    audio = hears.modality_layout.media["audio"]
    inputs["input_ids"][inputs["input_ids"] == audio] = 5
    inputs["input_ids"][0, :4] = audio
    masks = hears.modality_layout.masks(inputs["input_ids"])
    with pytest.raises(ml.SampleError, match=r"sample 0: .*do not match"):
        ml.mine(hears, [(inputs, masks)], progress=False)


def test_model_that_hears_nothing(shapes: Any) -> None:
    with pytest.raises(ml.SampleError, match="no feature extractor"):
        ml.inputs(shapes, ask(clip(1)))

"""From messages with media to scores and answers, by processors made here, without a hub."""

from __future__ import annotations

import base64
import json
import string
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CLIPImageProcessor,
    Gemma3ImageProcessor,
    Gemma3Processor,
    GotOcr2ImageProcessor,
    InternVLProcessor,
    InternVLVideoProcessor,
    LlavaProcessor,
    PaliGemmaProcessor,
    PixtralImageProcessor,
    PixtralProcessor,
    PreTrainedTokenizerFast,
    Qwen2_5_VLProcessor,
    Qwen2_5OmniProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
    SiglipImageProcessor,
    SmolVLMImageProcessor,
    SmolVLMProcessor,
    SmolVLMVideoProcessor,
    WhisperFeatureExtractor,
)

import miner_lens as ml
from miner_lens.models import access
from tests.families import AUDIO_TOWER, PATCH, SIDE, build, text
from tests.models.test_experts import qwen3_vl_moe
from tests.models.test_families import of_decoder
from tests.parts import FAMILIES
from tests.towers import AUDIO, IMAGE

pytestmark = pytest.mark.filterwarnings("ignore:TransformerLens rebuilds")

WORDS = ["<pad>", "<s>", "</s>", "<unk>", *string.ascii_lowercase, *string.digits, *" ?.\n"]
MEDIA = ["<image>", "<video>", "<start>", "<end>", "<audio>", "<audio_start>", "<audio_end>"]
SQUARE = {"height": SIDE, "width": SIDE}
GRID: dict[str, Any] = {"patch_size": 2, "temporal_patch_size": 2, "merge_size": 2}
GRID |= {"min_pixels": 4 * 4, "max_pixels": 16 * 16}
TEMPLATE = """{% for message in messages %}<s>{% for part in message.content %}
{%- if part.type == 'text' %}{{ part.text }}
{%- elif part.type == 'audio' %}<audio_start><audio><audio_end>
{%- else %}IMAGE{% endif %}
{%- endfor %}</s>{% endfor %}"""


def tokenizer(**tokens: str) -> Any:
    """One token for each character, with the placeholders of the tiny models."""
    unused = [f"<{number}>" for number in range(len(WORDS), IMAGE)]
    vocabulary = {token: number for number, token in enumerate([*WORDS, *unused, *MEDIA])}
    characters = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    characters.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    characters.decoder = decoders.Fuse()
    characters.add_special_tokens([*WORDS[:4], *MEDIA])
    return PreTrainedTokenizerFast(
        tokenizer_object=characters,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        extra_special_tokens=tokens,
    )


def llava() -> Any:
    return LlavaProcessor(
        CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size=SQUARE),
        tokenizer(),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,  # of the class
    )


def gemma3() -> Any:
    tokens = {"image_token": "<image>", "boi_token": "<start>", "eoi_token": "<end>"}
    return Gemma3Processor(
        Gemma3ImageProcessor(size=SQUARE), tokenizer(**tokens), image_seq_length=4
    )


def paligemma() -> Any:
    images = SiglipImageProcessor(size=SQUARE)
    images.image_seq_length = 4
    return PaliGemmaProcessor(images, tokenizer(image_token="<image>"))


def internvl() -> Any:
    tokens = {"context_image_token": "<image>", "video_token": "<video>"}
    tokens |= {"start_image_token": "<start>", "end_image_token": "<end>"}
    images = GotOcr2ImageProcessor(size=SQUARE)
    videos = InternVLVideoProcessor(size=SQUARE)
    return InternVLProcessor(images, tokenizer(**tokens), videos, image_seq_length=1)


def mistral3() -> Any:
    return PixtralProcessor(
        PixtralImageProcessor(patch_size=PATCH, size={"longest_edge": 16}),
        tokenizer(),
        patch_size=PATCH,
        spatial_merge_size=2,
        image_token="<image>",
        image_break_token="<start>",
        image_end_token="<end>",
    )


def qwen(processor: Any, videos: Any, **tokens: str) -> Any:
    tokens |= {"image_token": "<image>", "video_token": "<video>"}
    tokens |= {"vision_start_token": "<start>", "vision_end_token": "<end>"}
    return processor(Qwen2VLImageProcessor(**GRID), tokenizer(**tokens), videos(**GRID))


def qwen2_5_vl() -> Any:
    return qwen(Qwen2_5_VLProcessor, Qwen2VLVideoProcessor)


def qwen3_vl() -> Any:
    return qwen(Qwen3VLProcessor, Qwen3VLVideoProcessor)


def qwen2_5_omni() -> Any:
    tokens = {"image_token": "<image>", "video_token": "<video>", "audio_token": "<audio>"}
    tokens |= {"vision_bos_token": "<start>", "vision_eos_token": "<end>"}
    tokens |= {"audio_bos_token": "<audio_start>", "audio_eos_token": "<audio_end>"}
    return Qwen2_5OmniProcessor(
        Qwen2VLImageProcessor(**GRID),
        Qwen2VLVideoProcessor(**GRID),
        WhisperFeatureExtractor(feature_size=8, chunk_length=2),
        tokenizer(**tokens),
    )


def smolvlm() -> Any:
    """It names the number of a video's frames, and needs a package for that also without videos."""
    pytest.importorskip("num2words")
    tokens = {"image_token": "<image>", "video_token": "<video>", "fake_image_token": "<start>"}
    tokens |= {"global_image_token": "<end>", "end_of_utterance_token": "</s>"}
    sizes = {"size": {"longest_edge": 2 * SIDE}, "max_image_size": {"longest_edge": SIDE}}
    videos = SmolVLMVideoProcessor(**sizes)
    images = SmolVLMImageProcessor(**sizes)
    return SmolVLMProcessor(images, tokenizer(**tokens), videos, image_seq_len=1)


FRAMED = "<start><image><end>"
# A processor for each family, how its chat template writes an image, and how many placeholders it
# makes of a picture of 64 x 64 pixels.
MADE: dict[str, tuple[Callable[[], Any], str, int]] = {
    "llava": (llava, "<image>", 4),
    "gemma3": (gemma3, "<start>", 4),
    "paligemma": (paligemma, "<image>", 4),
    "internvl": (internvl, "<image>", 10),  # nine tiles, and the whole
    "smolvlm": (smolvlm, "<image>", 5),  # four tiles, and the whole
    "mistral3": (mistral3, "<image>", 4),
    "qwen2_5_vl": (qwen2_5_vl, FRAMED, 16),
    "qwen3_vl": (qwen3_vl, FRAMED, 16),
    "qwen2_5_omni": (qwen2_5_omni, FRAMED, 16),
}


@pytest.mark.parametrize("name", MADE)
def test_messages(name: str, tmp_path: Path) -> None:
    make, image, count = MADE[name]
    plain, _ = FAMILIES[name].make()
    bridge = loaded(plain, make(), image, tmp_path)
    processor = bridge.processor
    messages = [{"role": "user", "content": question(name == "qwen2_5_omni")}]
    inputs = dict(
        processor.apply_chat_template(
            messages, tokenize=True, return_dict=True, return_tensors="pt"
        )
    )
    inputs.pop("labels", None)
    assert int((inputs["input_ids"] == IMAGE).sum()) == count

    scores = ml.mine(bridge, [ml.Sample(messages)], progress=False)
    real = inputs["attention_mask"].bool()
    masks = access.layout(bridge).masks(inputs["input_ids"], real)
    case: Any = SimpleNamespace(
        untouched=plain, inputs=inputs, parts=FAMILIES[name].parts, real=real
    )
    torch.testing.assert_close(scores.values, of_decoder(case, masks), atol=1e-5, rtol=0)
    assert scores.modalities == tuple(masks)
    assert masks["special"].any()
    assert masks["image"].any()
    for site in set(FAMILIES[name].parts) - {"llm"}:
        towers = ml.mine(bridge, [ml.Sample(messages)], progress=False, site=site)
        assert towers.values.amax() == 1

    with torch.no_grad():
        tokens = plain.generate(**inputs, do_sample=False, max_new_tokens=4)
    answer = processor.batch_decode(
        tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
    )
    assert ml.generate(bridge, messages, 4) == answer[0]
    report = ml.check_family(bridge, messages)
    assert report.passed, report


def loaded(plain: Any, processor: Any, image: str, folder: Path) -> Any:
    """The model and its processor, from a folder."""
    processor.chat_template = TEMPLATE.replace("IMAGE", image)
    for part in (plain, processor):
        part.save_pretrained(folder)
    ml.load(folder, device="cpu")  # what was read of the first does not change how others load
    return ml.load(folder, device="cpu")


def test_experts(tmp_path: Path) -> None:
    plain, _ = qwen3_vl_moe()
    bridge = loaded(plain, qwen3_vl(), FRAMED, tmp_path)
    messages = [{"role": "user", "content": question(False)}]
    report = ml.check_family(bridge, messages)
    assert report.passed, report
    scores = ml.mine(bridge, [ml.Sample(messages)], progress=False)
    assert scores.values[:, scores.modalities.index("image")].any()
    neurons = scores.select(0.1)["image"]
    before = ml.generate(bridge, messages, 4)
    with ml.ablate(bridge, ~neurons):
        assert ml.generate(bridge, messages, 4) != before
    assert ml.generate(bridge, messages, 4) == before


def question(heard: bool) -> list[dict[str, Any]]:
    pixels = np.arange(64 * 64 * 3).reshape(64, 64, 3) % 251
    parts: list[dict[str, Any]] = [
        {"type": "image", "image": Image.fromarray(pixels.astype(np.uint8))}
    ]
    if heard:
        tone = np.sin(np.arange(16_000) * 0.2).astype(np.float32) / 2
        parts.append({"type": "audio", "audio": tone, "sampling_rate": 16_000})
    return [*parts, {"type": "text", "text": "what is this?"}]


def test_placeholders_are_those_of_the_models() -> None:
    ids = tokenizer().convert_tokens_to_ids(["<image>", "<audio>"])
    assert ids == [IMAGE, AUDIO]


def voxtral(folder: Path) -> Any:
    """With a tokenizer of Mistral's own, of one token for each byte."""
    pytest.importorskip("mistral_common")
    from mistral_common.tokens.tokenizers.tekken import Tekkenizer

    control = [token["token_str"] for token in Tekkenizer.DEPRECATED_SPECIAL_TOKENS][:24]
    control += [f"<{n}>" for n in range(len(control), 24)] + [
        "[AUDIO]",
        "[BEGIN_AUDIO]",
        "[TRANSCRIBE]",
    ]
    byte = [base64.b64encode(bytes([n])).decode() for n in range(256)]
    made = {
        "config": {
            "pattern": r"[\s\S]",
            "num_vocab_tokens": len(byte),
            "default_vocab_size": len(byte) + len(control),
            "default_num_special_tokens": len(control),
            "version": "v7",
        },
        "vocab": [{"rank": n, "token_bytes": b, "token_str": None} for n, b in enumerate(byte)],
        "special_tokens": [
            {"rank": n, "token_str": token, "is_control": True} for n, token in enumerate(control)
        ],
        "audio": {
            "sampling_rate": 16_000,
            "frame_rate": 12.5,
            "chunk_length_s": 30,
            "audio_encoding_config": {"num_mel_bins": 8, "hop_length": 160, "window_size": 400},
        },
    }
    (folder / "tekken.json").write_text(json.dumps(made))
    own = transformers.MistralCommonBackend(tokenizer_path=str(folder / "tekken.json"))
    return transformers.VoxtralProcessor(WhisperFeatureExtractor(feature_size=8), own)


def test_a_tokenizer_of_mistral(tmp_path: Path) -> None:
    processor = voxtral(tmp_path)
    heard = AUDIO_TOWER | {"encoder_ffn_dim": 80, "intermediate_size": 80}
    model = build(
        "VoxtralForConditionalGeneration",
        text_config=text(vocab_size=300),
        audio_config=heard | {"max_source_positions": 1500},
        audio_token_id=24,
    )
    bridge = ml.wrap(model, processor)
    messages = [{"role": "user", "content": question(True)[1:]}]
    report = ml.check_family(bridge, messages)
    assert report.passed, report
    ids = ml.inputs(bridge, messages)["input"][0].tolist()
    assert ids.count(24) == 375  # thirty seconds, as all sounds are padded to that
    assert bytes(i - 27 for i in ids if i >= 27).decode() == "what is this?"
    for site in ("llm", "audio", "projector"):
        scores = ml.mine(bridge, [ml.Sample(messages)], progress=False, site=site)
        assert scores["audio"].any()
    assert {0, 1, 2, 25} <= access.layout(bridge).special


@pytest.mark.parametrize("messages", ["hello", {"role": "user"}, [], ["hello"], None, 3])
def test_what_is_no_conversation_is_refused(shapes: Any, messages: Any) -> None:
    with pytest.raises(ValueError, match="messages must be a conversation"):
        ml.generate(shapes, messages)


@pytest.mark.parametrize("count", [0, -1, 1.5])
def test_a_number_of_answers_is_a_whole_number(shapes: Any, count: Any) -> None:
    messages = [{"role": "user", "content": "what color is it?"}]
    with pytest.raises(ValueError, match="num_return_sequences must be a whole number"):
        ml.generate(shapes, messages, 2, num_return_sequences=count)

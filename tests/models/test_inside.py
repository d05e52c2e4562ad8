"""Models inside bridges and inside the wrappers of torch and PEFT, and out of them again."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.parallel import DataParallel, DistributedDataParallel
from transformers import (
    AutoModelForImageTextToText,
    CompileConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import miner_lens as ml
from miner_lens.models.access import identity, layout, mlps
from miner_lens.models.bridge import prepare
from miner_lens.models.pass_inputs import pass_inputs
from tests.towers import (
    IMAGE,
    TEXT,
    audio_inputs,
    audio_model,
    one_image,
    vision_inputs,
    vision_model,
)


def llama_model() -> LlamaForCausalLM:
    torch.manual_seed(7)
    return LlamaForCausalLM(LlamaConfig(**TEXT)).eval()


def qwen3_model() -> Qwen3ForCausalLM:
    """TransformerLens sets eager attention in this one."""
    torch.manual_seed(7)
    return Qwen3ForCausalLM(Qwen3Config(**TEXT, head_dim=8)).eval()


def text_inputs() -> dict[str, Any]:
    return {"input_ids": torch.arange(3, 12)[None]}


KINDS = {
    "vision": (vision_model, vision_inputs),
    "audio": (audio_model, audio_inputs),
    "llama": (llama_model, text_inputs),
    "qwen3": (qwen3_model, text_inputs),
}
SOME = ((0, 3), (0, 40), (1, 17))


def logits(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs).logits


def ablated(model: Any, neurons: Any, inputs: dict[str, Any], called: Any = None) -> torch.Tensor:
    with ml.ablate(model, neurons, value="min"):
        return logits(model if called is None else called, inputs)


def mined(bridge: Any, inputs: dict[str, Any]) -> torch.Tensor:
    data = [(inputs, {"text": inputs["input_ids"] != 0})]
    return ml.mine(bridge, data, progress=False).values


def shape_of(model: Any) -> Any:
    """All that wrapping could have changed."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_forward_pre_hooks_with_kwargs")
    names = {
        name: getattr(module.config, "_attn_implementation", None)
        for name, module in model.named_modules()
        if hasattr(module, "config")
    }
    attributes = {
        name: vars(module).keys() - {"_is_hf_initialized"} for name, module in model.named_modules()
    }
    return (
        list(model.state_dict()),
        [(name, type(module)) for name, module in model.named_modules()],
        [name for name, _ in model.named_parameters()],
        [name for name, _ in model.named_buffers()],
        [len(getattr(module, kind)) for module in model.modules() for kind in hooks],
        names,
        attributes,
        model.training,
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_unwrapped_is_as_never_wrapped(kind: str, implementation: str, tmp_path: Path) -> None:
    make, make_inputs = KINDS[kind]
    inputs, model = make_inputs(), make()
    model.set_attn_implementation(implementation)
    untouched = copy.deepcopy(model)
    expected = logits(untouched, inputs)
    bridge = ml.wrap(model)
    scores = mined(bridge, inputs)
    assert shape_of(model) != shape_of(untouched)

    plain = ml.unwrap(bridge)
    assert plain is model
    assert shape_of(plain) == shape_of(untouched)
    assert torch.equal(logits(plain, inputs), expected)
    plain.save_pretrained(tmp_path)
    saved = type(model).from_pretrained(tmp_path, attn_implementation=implementation).eval()
    assert torch.equal(logits(saved, inputs), expected)

    again = ml.wrap(plain)
    assert torch.equal(mined(again, inputs), scores)
    assert shape_of(ml.unwrap(again)) == shape_of(untouched)


def rotated(bridge: Any, inputs: dict[str, Any]) -> int:
    """How often a layer's hook on rotated queries fires in a pass."""
    seen: list[Any] = []
    with bridge.hooks(fwd_hooks=[("blocks.0.attn.hook_rot_q", lambda q, hook: seen.append(q))]):
        logits(bridge.original_model, inputs)
    return len(seen)


def hooks_of(bridge: Any) -> int:
    kinds = ("_forward_hooks", "_forward_pre_hooks")
    return sum(len(getattr(m, kind)) for m in bridge.original_model.modules() for kind in kinds)


def test_hooks_fire_whatever_is_copied_or_set() -> None:
    inputs, bridge = vision_inputs(), ml.wrap(vision_model())
    assert rotated(bridge, inputs) == 1  # TransformerLens has hooks of its own from then on
    first, copied = hooks_of(bridge), bridge
    for _ in range(2):
        copied = copy.deepcopy(copied)
        assert rotated(copied, inputs) == 1
        assert hooks_of(prepare(copied)) == first
    assert rotated(bridge, inputs) == 1
    for name in ("eager", "sdpa"):
        for one in (bridge, copied):
            one.original_model.set_attn_implementation(name)
            assert rotated(one, inputs) == 1
    assert hooks_of(bridge) == hooks_of(copied) == first
    assert torch.equal(mined(copied, inputs), mined(bridge, inputs))


@pytest.mark.parametrize("attention", ["bidirectional", "causal"])
def test_patterns_have_the_scale_of_the_model(attention: Any) -> None:
    """Four times the scale and a quarter of the queries are the same model."""
    inputs, rescaled = vision_inputs(), vision_model()
    for layer in rescaled.get_decoder().layers:
        layer.self_attn.scaling *= 4
        layer.self_attn.q_proj.weight.data /= 4
        layer.self_attn.q_proj.bias.data /= 4
    data = [(inputs, {"text": inputs["input_ids"] != 0})]
    bridges = [ml.wrap(model) for model in (vision_model(), rescaled)]
    ours, theirs = (ml.mine(b, data, attention, progress=False).values for b in bridges)
    torch.testing.assert_close(ours, theirs, atol=2e-6, rtol=0)


def test_ids_are_those_of_the_pass_and_not_those_that_are_embedded() -> None:
    """Some families embed another token in the place of media, such as Gemma 3."""
    inputs, bridge = vision_inputs(), ml.wrap(vision_model())
    bridge.modality_layout = ml.ModalityLayout({"image": IMAGE})
    data = [(inputs, bridge.modality_layout.masks(inputs["input_ids"], inputs["attention_mask"]))]
    expected = ml.mine(bridge, data, progress=False)
    neurons = ml.NeuronSet.of(SOME, bridge)
    with ml.ablate(bridge, neurons, at="image"):
        ablated_there = logits(bridge.original_model, inputs)
    embedding = bridge.original_model.get_input_embeddings()
    embedding.register_forward_pre_hook(lambda _, ids: ids[0].masked_fill(ids[0] == IMAGE, 0))
    analyzer = ml.ImportanceAnalyzer()
    with bridge.hooks(fwd_hooks=analyzer.hooks(bridge)):
        logits(bridge.original_model, inputs)
    assert torch.equal(analyzer.result().values, expected.values)
    with ml.ablate(bridge, neurons, at="image"):
        assert torch.equal(logits(bridge.original_model, inputs), ablated_there)
    hooks = ml.ablation_hooks(bridge, neurons, at="image")
    with bridge.hooks(fwd_hooks=hooks):
        assert torch.equal(logits(bridge.original_model, inputs), ablated_there)


def test_tied_weights_stay_tied(tmp_path: Path) -> None:
    bridge = ml.load("shapes", device="cpu")
    processor = bridge.processor
    (sample,) = ml.datasets.load("easy-vqa", limit=1)
    answer = ml.generate(bridge, sample.messages, 4)
    plain = ml.unwrap(bridge)
    assert plain.lm_head.weight is plain.get_input_embeddings().weight
    plain.save_pretrained(tmp_path)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    for model in (plain, again):
        assert ml.generate(ml.wrap(model, processor), sample.messages, 4) == answer


def test_a_setting_made_since_stays() -> None:
    for make, before, since in ((llama_model, "sdpa", "eager"), (vision_model, "eager", "sdpa")):
        model = make()
        model.set_attn_implementation(before)
        bridge = ml.wrap(model)
        model.set_attn_implementation(since)
        plain = ml.unwrap(bridge)
        assert plain.get_decoder().config._attn_implementation == since


def test_copies_are_unwrapped_by_themselves() -> None:
    inputs, model = vision_inputs(), vision_model()
    untouched = copy.deepcopy(model)
    bridge = ml.wrap(model)
    copied = copy.deepcopy(bridge)
    prepare(copied)
    assert pass_inputs(copied) is not pass_inputs(bridge)
    scores = mined(bridge, inputs)
    assert torch.equal(mined(copied, inputs), scores)
    plain = ml.unwrap(copied)
    assert plain is not model
    assert shape_of(plain) == shape_of(untouched)
    assert torch.equal(mined(bridge, inputs), scores)


def test_bridges_that_users_made() -> None:
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    model = llama_model()
    untouched = copy.deepcopy(model)
    bridge = build_bridge_from_module(model, "LlamaForCausalLM", hf_config=model.config)
    assert shape_of(ml.unwrap(bridge)) == shape_of(untouched)


def test_the_bridge_is_dead_afterwards() -> None:
    bridge = ml.wrap(vision_model())
    neurons = ml.NeuronSet.of(SOME, bridge)
    ml.unwrap(bridge)
    ids = vision_inputs()["input_ids"]
    uses: dict[str, Callable[[], Any]] = {
        "call": lambda: bridge(ids),
        "cache": lambda: bridge.run_with_cache(ids),
        "hooks": lambda: bridge.run_with_hooks(ids),
        "mine": lambda: mined(bridge, vision_inputs()),
        "ablate": lambda: ml.ablate(bridge, neurons).__enter__(),
        "unwrap": lambda: ml.unwrap(bridge),
    }
    for use in uses.values():
        with pytest.raises(ValueError, match=r"taken out of this bridge by ml\.unwrap"):
            use()


def test_what_cannot_be_unwrapped() -> None:
    with pytest.raises(ValueError, match="needs a TransformerBridge, got LlamaForCausalLM"):
        ml.unwrap(llama_model())
    bridge = ml.wrap(llama_model())
    with pytest.raises(ValueError, match=r"already.*ml\.unwrap"):
        ml.wrap(bridge.original_model)
    bridge.enable_compatibility_mode()
    with pytest.raises(ValueError, match="compatibility mode"):
        ml.unwrap(bridge)


# Wrappers.


@pytest.fixture
def one_process() -> Iterator[None]:
    """The process group that DistributedDataParallel asks for."""
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


@pytest.fixture(autouse=True)
def _compile_anew() -> Iterator[None]:
    torch._dynamo.reset()
    logging.getLogger("torch._dynamo").setLevel(logging.ERROR)
    yield
    torch._dynamo.reset()


# Each image and each video more would be compiled anew, which takes seconds.
COMPILED = {"llama": KINDS["llama"], "vision": (vision_model, one_image)}


@pytest.mark.parametrize(
    ("kind", "backend"), [("llama", "eager"), ("llama", "aot_eager"), ("vision", "aot_eager")]
)
@pytest.mark.parametrize("first", ["intact", "ablated"])
def test_compiled_models_are_ablated(kind: str, backend: str, first: str) -> None:
    """Whether they were compiled before the hooks are there, or would be while they are."""
    make, make_inputs = COMPILED[kind]
    inputs, model = make_inputs(), make()
    neurons = ml.NeuronSet.of(SOME, model)
    intact, expected = logits(model, inputs), ablated(model, neurons, inputs)
    assert not torch.allclose(intact, expected, atol=1e-4)
    compiled = torch.compile(model, backend=backend)
    assert identity(compiled) == identity(model)
    assert mlps(compiled) == mlps(model)
    if first == "intact":
        torch.testing.assert_close(logits(compiled, inputs), intact, atol=1e-5, rtol=0)
    for given in (compiled, model):
        assert torch.equal(ablated(given, neurons, inputs, called=compiled), expected)
        torch.testing.assert_close(logits(compiled, inputs), intact, atol=1e-5, rtol=0)


def test_models_compiled_in_place_are_ablated() -> None:
    inputs, model = text_inputs(), llama_model()
    neurons = ml.NeuronSet.of(SOME, model)
    intact, expected = logits(model, inputs), ablated(model, neurons, inputs)
    model.compile(backend="eager")
    assert torch.equal(logits(model, inputs), intact)
    assert torch.equal(ablated(model, neurons, inputs), expected)
    assert torch.equal(logits(model, inputs), intact)


@pytest.mark.parametrize("compiled", [False, True])
def test_each_step_of_decoding_with_a_static_cache_is_ablated(compiled: bool) -> None:
    """Hugging Face compiles these steps by itself, on a CPU only when it is told to."""
    model, ids = llama_model(), text_inputs()["input_ids"]
    options: dict[str, Any] = {"cache_implementation": "static"}
    if compiled:
        options["compile_config"] = CompileConfig(backend="eager", mode=None, fullgraph=False)
        options["compile_config"]._compile_all_devices = True

    def generated(**given: Any) -> torch.Tensor:
        common = {"do_sample": False, "max_new_tokens": 8, "output_logits": True}
        mask = torch.ones_like(ids)
        with torch.no_grad():
            out = model.generate(
                ids, attention_mask=mask, return_dict_in_generate=True, **common, **given
            )
        return torch.stack(out.logits)

    intact = generated(**options)
    neurons = ~ml.NeuronSet.of([(0, 1)], model)
    with ml.ablate(model, neurons):
        expected = generated()
        torch.testing.assert_close(generated(**options), expected, atol=1e-5, rtol=0)
    assert torch.equal(generated(**options), intact)
    assert not torch.allclose(intact, expected, atol=0.1)


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("wrapper", [DistributedDataParallel, DataParallel])
def test_parallel_models(wrapper: Any, tmp_path: Path) -> None:
    inputs, model = vision_inputs(), vision_model()
    neurons = ml.NeuronSet.of(SOME, model)
    expected = ablated(model, neurons, inputs)
    wrapped = wrapper(model)
    assert identity(wrapped) == identity(model)
    assert torch.equal(ablated(wrapped, neurons, inputs), expected)
    ml.bake(wrapped, neurons, tmp_path / "baked")
    assert torch.equal(mined(ml.wrap(wrapped), inputs), mined(ml.wrap(vision_model()), inputs))


def test_processors_and_layouts_are_found_inside_wrappers(shapes: Any) -> None:
    (sample,) = ml.datasets.load("easy-vqa", limit=1)
    answer = ml.generate(shapes, sample.messages, 4)
    for wrapper in (lambda model: torch.compile(model, backend="eager"), DataParallel):
        wrapped = wrapper(shapes)
        assert layout(wrapped) == layout(shapes)
        assert ml.inputs(wrapped, sample.messages).keys() == (
            ml.inputs(shapes, sample.messages).keys()
        )
        assert ml.generate(wrapped, sample.messages, 4) == answer


# PEFT.


TARGETS = {
    "attention": ["q_proj", "v_proj"],
    "mlp": ["gate_proj", "up_proj", "down_proj"],
    "embedding": ["embed_tokens", "gate_proj"],
}


def with_adapters(model: Any, target: str, trained: bool = True) -> Any:
    peft = pytest.importorskip("peft")
    options = {"target_modules": TARGETS[target], "r": 4, "task_type": "CAUSAL_LM"}
    config = peft.LoraConfig(**options, init_lora_weights=not trained)
    return peft.get_peft_model(model, config).eval()


def test_adapters_on_offloaded_weights() -> None:
    """PEFT makes them where the weights are said to be, and there they hold nothing."""
    accelerate = pytest.importorskip("accelerate")
    before = identity(vision_model())
    offloaded = accelerate.cpu_offload(vision_model())
    assert identity(offloaded) == before
    model = with_adapters(offloaded, "mlp")
    assert identity(model).fingerprint is None
    with model.disable_adapter():
        assert identity(model) == before


class Doubled(torch.nn.Module):
    """A layer of somebody's own, with no more attributes than it needs."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * self.inner(x)


def test_gates_of_another_kind() -> None:
    """Neurons are counted where the down projection takes them."""
    inputs, model, by_hand = vision_inputs(), vision_model(), vision_model()
    for layer in model.get_decoder().layers:
        layer.mlp.gate_proj = Doubled(layer.mlp.gate_proj)
    for layer in by_hand.get_decoder().layers:
        layer.mlp.gate_proj.weight.data *= 2
    assert (identity(model).neurons, identity(model).fingerprint) == (48, None)
    neurons = ml.NeuronSet(SOME, layers=2, neurons=48)
    torch.testing.assert_close(
        ablated(model, neurons, inputs), ablated(by_hand, neurons, inputs), atol=1e-5, rtol=0
    )


def test_merged_adapters_are_other_weights() -> None:
    model = with_adapters(vision_model(), "mlp")
    before = identity(model)
    assert identity(model.merge_and_unload()) != before


@pytest.mark.parametrize("target", TARGETS)
def test_models_with_adapters_are_ablated_and_baked(target: str, tmp_path: Path) -> None:
    inputs, model = vision_inputs(), with_adapters(vision_model(), target)
    assert not torch.allclose(logits(model, inputs), logits(vision_model(), inputs), atol=1e-2)
    merged = copy.deepcopy(model).merge_and_unload()
    neurons = ml.NeuronSet(SOME, layers=2, neurons=48)
    for value, at in (("zero", None), ("min", "image")):
        with ml.ablate(model, neurons, value, at):
            theirs = logits(model, inputs)
        with ml.ablate(merged, neurons, value, at):
            torch.testing.assert_close(theirs, logits(merged, inputs), atol=1e-4, rtol=0)
    path = ml.bake(model, neurons, tmp_path / "baked")
    baked = AutoModelForImageTextToText.from_pretrained(path).eval()
    with ml.ablate(model, neurons):
        torch.testing.assert_close(logits(model, inputs), logits(baked, inputs), atol=1e-4, rtol=0)
    assert not torch.allclose(logits(baked, inputs), logits(model, inputs), atol=1e-2)


def test_weights_to_bake_that_are_not_there(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"])
    model = peft.get_peft_model(vision_model(), config)
    with pytest.raises(ValueError, match=r"has no lm_head\.weight.*merge_and_unload"):
        ml.bake(model, ml.NeuronSet.of(SOME, model), tmp_path / "baked")


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("kind", ["llama", "vision"])
def test_models_with_adapters_are_wrapped_and_mined(kind: str, target: str) -> None:
    """As the same model with its adapters merged."""
    make, make_inputs = KINDS[kind]
    inputs, model = make_inputs(), with_adapters(make(), target)
    untouched = copy.deepcopy(model)
    bridge = ml.wrap(model)
    expected = logits(untouched, inputs)
    torch.testing.assert_close(logits(bridge.original_model, inputs), expected, atol=1e-5, rtol=0)
    merged = ml.wrap(copy.deepcopy(untouched).merge_and_unload())
    torch.testing.assert_close(mined(bridge, inputs), mined(merged, inputs), atol=1e-4, rtol=0)
    assert ml.unwrap(bridge) is model.get_base_model()
    assert shape_of(model) == shape_of(untouched)
    assert torch.equal(logits(model, inputs), expected)

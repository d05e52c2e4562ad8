"""What a wrapped model's own methods do: generation, compatibility mode, modes of training."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformer_lens import HookedRootModule
from transformers import AutoProcessor, GenerationConfig
from transformers.generation import ContinuousBatchingConfig

import miner_lens as ml
from miner_lens.models.bridge import prepare
from tests import families
from tests.towers import TEXT, vision_model


def llama_model() -> Any:
    return families.build("LlamaForCausalLM", **TEXT)


@pytest.mark.parametrize("kind", ["LlamaForCausalLM", "Phi3ForCausalLM"])  # one gate-and-up
@pytest.mark.parametrize("wrapped_before", [True, False])
def test_compatibility_mode(kind: str, wrapped_before: bool) -> None:
    """Weights are processed, and X is what it was."""
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    made = families.build(kind, **(TEXT | {"head_dim": 8}))
    by_hand, ids = copy.deepcopy(made), torch.arange(5, 15)[None]
    if wrapped_before:
        bridge = ml.wrap(made)
    else:
        bridge = build_bridge_from_module(made, kind, hf_config=made.config)
    bridge.enable_compatibility_mode(disable_warnings=True)
    seen: list[torch.Tensor] = []
    for layer in by_hand.model.layers:
        act = getattr(layer.mlp, "act_fn", None) or layer.mlp.activation_fn
        act.register_forward_hook(lambda _, __, x: seen.append(x))
    with torch.no_grad():
        by_hand(ids)
    scores = ml.mine(bridge, [({"input_ids": ids}, {"text": ids > 0})], progress=False)
    means = torch.stack([x[0].mean(0) for x in seen])
    low, high = means.amin(-1, keepdim=True), means.amax(-1, keepdim=True)
    mined = scores.values[scores.metrics.index("mean"), 0]
    torch.testing.assert_close(
        mined.double(), ((means - low) / (high - low)).double(), atol=4e-6, rtol=0
    )
    neurons = ml.NeuronSet.of([(0, n) for n in range(0, 48, 2)], bridge)
    with torch.no_grad():
        intact = bridge(ids)
        by_hand.model.layers[0].mlp.down_proj.weight[:, ::2] = 0
        expected = by_hand(ids).logits.log_softmax(-1)
        with ml.ablate(bridge, neurons):
            ablated = bridge(ids).log_softmax(-1)
    torch.testing.assert_close(ablated, expected, atol=1e-5, rtol=0)
    assert (intact.log_softmax(-1) - expected).abs().max() > 0.1
    with pytest.raises(ValueError, match="former weights are gone"):
        ml.unwrap(bridge)


def test_compatibility_mode_waits_for_contexts_to_close() -> None:
    bridge = ml.wrap(llama_model())
    neurons = ml.NeuronSet.of([(0, 1)], bridge)
    contexts = (lambda: ml.ablate(bridge, neurons), lambda: ml.scale(bridge, neurons, 2.0))
    for context in contexts:
        with context(), pytest.raises(ValueError, match=r"ml\.ablate.*is open"):
            bridge.enable_compatibility_mode()
        assert not bridge.compatibility_mode
    bridge.enable_compatibility_mode(no_processing=True)
    assert bridge.compatibility_mode


def test_components_are_in_the_mode_of_what_they_wrap() -> None:
    """TransformerLens's analyses refuse a model any part of which is in training mode."""
    for name in ("llava", "mistral3", "llama"):
        for mode in (False, True):
            model = getattr(families, name)()[0].train(mode)
            still = [layer.mlp.act_fn for layer in model.get_decoder().layers]
            for module in still:
                module.train(not mode)
            bridge = ml.wrap(model)
            prepare(bridge)
            modules = {*bridge.modules(), *bridge.original_model.modules()}
            others = [m for m in modules if m.training != mode]
            around = [m for m in others if getattr(m, "original_component", m) not in still]
            assert {type(m).__name__ for m in around} <= {"HookPoint"}
            assert still
            assert all(module in others for module in still)
            bridge.train(mode)
            assert all(m.training == mode for m in modules)


def test_what_is_no_model() -> None:
    class Own(HookedRootModule):
        def forward(self, x: Any) -> Any:
            return x

    uses = (
        lambda model: ml.wrap(model),
        lambda model: ml.mine(model, []),
        lambda model: ml.ablate(model, ml.NeuronSet([(0, 1)], layers=2, neurons=48)).__enter__(),
        lambda model: ml.bind(model, {}).__enter__(),
    )
    for use in uses:
        for model in (Own(), torch.nn.Linear(2, 2)):
            with pytest.raises(ValueError, match=r"Expected a TransformerBridge.*HookedRootModule"):
                use(model)


def test_names_and_classes_are_no_models(shapes: Any) -> None:
    kind, messages = type(shapes.original_model), ASKED[0].messages
    uses = (
        lambda model: ml.wrap(model),
        lambda model: ml.inputs(model, messages),
        lambda model: ml.generate(model, messages),
        lambda model: ml.ablate(model, ml.NeuronSet([(0, 1)], layers=2, neurons=48)).__enter__(),
        lambda model: ml.bind(model, {}).__enter__(),
    )
    loads = rf"loaded model, got the class {kind.__name__}\..*{kind.__name__}\.from_pretrained"
    for use in uses:
        for name in ("shapes", Path("shapes")):
            with pytest.raises(TypeError, match=r"loaded model, got a name.*ml\.load\('shapes'\)"):
                use(name)
        with pytest.raises(TypeError, match=loads + r".*ml\.load\(name\)"):
            use(kind)


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ("x", "'x'"),
        (False, "False"),
        ({}, "an object of type dict"),
        (AutoProcessor, "the class AutoProcessor"),
        (torch.nn.Identity(), "an object of type Identity"),
    ],
)
def test_what_is_no_processor(given: Any, named: str) -> None:
    """It is refused, and the model is left as it was."""
    model = llama_model()
    modules = dict(model.named_modules())
    said = rf"processor, or None, and not {named}\..*AutoProcessor\.from_pretrained.*check=False"
    with pytest.raises(TypeError, match=said):
        ml.wrap(model, given)
    assert dict(model.named_modules()) == modules


def test_a_bridge_is_no_processor(shapes: Any) -> None:
    """Though it has a tokenizer."""
    with pytest.raises(TypeError, match="an object of type TransformerBridge"):
        ml.wrap(llama_model(), shapes)


FAMILIES = ("qwen2_vl", "qwen3_vl", "qwen2_audio", "llava", "gemma3", "qwen2_5_omni")


@pytest.mark.parametrize("family", FAMILIES)
def test_generation_on_padded_batches(family: str) -> None:
    """TransformerLens's loop, with a cache and without one, gives Hugging Face's tokens."""
    model, inputs = getattr(families, family)()
    options = {"max_new_tokens": 4, "do_sample": False}
    plain = {**options, "eos_token_id": None, "output_logits": True}
    expected = model.generate(**inputs, **plain, return_dict_in_generate=True)
    bridge = ml.wrap(model)
    given = {"input" if name == "input_ids" else name: value for name, value in inputs.items()}
    options |= {"stop_at_eos": False, "verbose": False, "output_logits": True}
    for cached in (True, False):
        found = bridge.generate(**given, **options, use_past_kv_cache=cached)
        assert torch.equal(found.sequences, expected.sequences)
        for ours, theirs in zip(found.logits, expected.logits, strict=True):
            torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=0)
    copied = copy.deepcopy(bridge)
    assert copied.generate.__self__ is copied


def test_what_there_is_for_each_token_and_more() -> None:
    """It is not known how it goes on, as with a mask between tokens and images."""
    model, inputs = families.llava()
    bridge = ml.wrap(model)
    mask = inputs["input_ids"][..., None].repeat(1, 1, 2)
    model.register_forward_pre_hook(
        lambda _, args, kwargs: (args, {n: v for n, v in kwargs.items() if n != "cross_mask"}),
        with_kwargs=True,
    )
    options = {"max_new_tokens": 2, "stop_at_eos": False, "verbose": False, "cross_mask": mask}
    bridge.generate(inputs["input_ids"], pixel_values=inputs["pixel_values"], **options)
    options["use_past_kv_cache"] = False
    with pytest.raises(ValueError, match=r"cross_mask of shape \[3, 12, 2\].*ml\.generate"):
        bridge.generate(inputs["input_ids"], pixel_values=inputs["pixel_values"], **options)


def test_continuing_a_pass_by_hand() -> None:
    """With a cache and the mask of the past too, as TransformerLens's loops pass them."""
    model, inputs = families.qwen2_vl()
    bridge = ml.wrap(model)
    with torch.no_grad():
        tokens = model.generate(**inputs, max_new_tokens=2, do_sample=False, eos_token_id=None)
        kinds = torch.nn.functional.pad(inputs["mm_token_type_ids"], (0, 1))
        mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 1), value=1)
        whole = inputs | {"input_ids": tokens[:, :-1], "attention_mask": mask}
        expected = model(**whole | {"mm_token_type_ids": kinds}).logits[:, -1]
        rest = {name: value for name, value in inputs.items() if name != "input_ids"}
        _, cache = bridge(
            inputs["input_ids"], **rest, use_cache=True, return_type="logits_and_cache"
        )
        found = bridge(tokens[:, -2:-1], past_key_values=cache, attention_mask=mask)
    torch.testing.assert_close(found[:, -1], expected, atol=2e-5, rtol=0)


ASKED = ml.datasets.load("easy-vqa", limit=2)


def test_several_answers(shapes: Any) -> None:
    """As plain Hugging Face gives them, grouped by conversation."""
    first, second = (sample.messages for sample in ASKED)
    beams = {"num_beams": 3, "num_return_sequences": 3, "do_sample": False, "max_new_tokens": 4}
    inputs = ml.inputs(shapes, first)
    ids = inputs.pop("input")
    tokens = shapes.original_model.generate(ids, **inputs, **beams)[:, ids.shape[1] :]
    expected = shapes.processor.batch_decode(tokens, skip_special_tokens=True)
    assert len(expected) == 3
    assert ml.generate(shapes, first, 4, num_beams=3, num_return_sequences=3) == expected
    both = ml.generate(shapes, [first, second], 4, num_beams=3, num_return_sequences=2)
    assert [len(answers) for answers in both] == [2, 2]
    assert both[0] == expected[:2]
    config = GenerationConfig(num_beams=3, num_return_sequences=3)
    assert ml.generate(shapes, first, 4, generation_config=config) == expected
    assert ml.generate(shapes, [first], 4, return_dict_in_generate=True) == [expected[0]]
    assert ml.generate(shapes, first, 4, num_return_sequences=1) == expected[0]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "Greedy decoding"),
        ({"num_beams": 2}, "Beam search with num_beams=2"),
        ({"num_beams": 2, "do_sample": True}, "Beam search with num_beams=2"),
        ({"generation_config": GenerationConfig(do_sample=True)}, "Greedy decoding"),
    ],
)
def test_more_answers_than_are_found(shapes: Any, options: dict[str, Any], said: str) -> None:
    wanted = f"{said} finds fewer.*num_return_sequences=3.*do_sample=True.*num_beams=3 or more"
    with pytest.raises(ValueError, match=wanted):
        ml.generate(shapes, ASKED[0].messages, 4, num_return_sequences=3, **options)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("cached", [True, False])
def test_several_samples_of_transformer_lens(family: str, cached: bool) -> None:
    """Rows in the order of transformers, each with its media: one token is left to sample.

    Transformers mixes up sounds where it encodes them anew for each row, as in Qwen2-Audio.
    """
    model, inputs = getattr(families, family)()
    plain = {"max_new_tokens": 4, "eos_token_id": None, "output_logits": True}
    greedy = model.generate(**inputs, **plain, do_sample=False, return_dict_in_generate=True)
    expected, logits = greedy.sequences.repeat_interleave(3, 0), greedy.logits
    options = {"max_new_tokens": 4, "do_sample": True, "top_k": 1, "num_return_sequences": 3}
    sampled = model.generate(**inputs, **options, eos_token_id=None)
    assert sampled.shape == expected.shape
    assert family == "qwen2_audio" or torch.equal(sampled, expected)
    bridge = ml.wrap(model)
    given = {"input" if name == "input_ids" else name: value for name, value in inputs.items()}
    options |= {"stop_at_eos": False, "verbose": False, "use_past_kv_cache": cached}
    assert torch.equal(bridge.generate(**given, **options), expected)
    tokens = given.pop("input")
    found, prompts = bridge.generate(
        tokens, **given, **options, output_logits=True, return_input_tokens=True
    )
    assert torch.equal(found.sequences, expected)
    assert torch.equal(prompts, tokens.repeat_interleave(3, 0))
    for ours, theirs in zip(found.logits, logits, strict=True):
        torch.testing.assert_close(ours, theirs.repeat_interleave(3, 0), atol=2e-5, rtol=0)


def test_copies_of_a_conversation_hear_their_own_sounds() -> None:
    """Each answer is that of the conversation by itself, also with several sounds in it."""
    model = ml.load("speech", device="cpu")
    first, second = (
        sample.messages for sample in ml.datasets.load("spoken-scenes", limit=2, ask="audio")
    )
    together = [
        {"role": "user", "content": [part for m in (first, second) for part in m[-1]["content"]]}
    ]
    alone = [ml.generate(model, messages, 6) for messages in (first, together)]
    assert alone[0] != alone[1]
    options = {"do_sample": True, "top_k": 1, "num_return_sequences": 3}
    found = ml.generate(model, [first, together], 6, **options)
    assert found == [[answer] * 3 for answer in alone]
    beams = {"num_beams": 2, "num_return_sequences": 2}
    with pytest.raises(ValueError, match="one medium in each conversation"):
        ml.generate(model, [first, together], 6, **beams)
    both = ml.generate(model, [first, second], 6, **beams)
    assert both == [ml.generate(model, messages, 6, **beams) for messages in (first, second)]


def test_samples_of_one_prompt_differ(shapes: Any) -> None:
    inputs = ml.inputs(shapes, ASKED[0].messages)
    options = {"max_new_tokens": 8, "do_sample": True, "num_return_sequences": 4}
    torch.manual_seed(0)
    found = shapes.generate(**inputs, **options, temperature=9.0, stop_at_eos=False, verbose=False)
    assert found.shape == (4, inputs["input"].shape[1] + 8)
    assert len(found.unique(dim=0)) == 4


def test_samples_of_texts(shapes: Any) -> None:
    options = {"max_new_tokens": 3, "top_k": 1, "stop_at_eos": False, "verbose": False}
    one, two = (shapes.generate(text, **options) for text in ("What colour", "Is there"))
    options["num_return_sequences"] = 2
    assert shapes.generate("What colour", **options) == [one, one]
    assert shapes.generate(["What colour", "Is there"], **options) == [one, one, two, two]


def test_samples_that_transformer_lens_does_not_make(shapes: Any) -> None:
    inputs = ml.inputs(shapes, ASKED[0].messages)
    said = r"num_return_sequences=2.*do_sample=True.*ml\.generate\(model, messages, num_beams=2"
    with pytest.raises(ValueError, match=said):
        shapes.generate(**inputs, num_return_sequences=2, do_sample=False)
    with pytest.raises(ValueError, match=r"no beam search.*ml\.generate"):
        shapes.generate(**inputs, num_return_sequences=2, num_beams=2)
    for count in (0, -1, 1.5, "2"):
        with pytest.raises(ValueError, match=r"a whole number from 1 on, not"):
            shapes.generate(**inputs, num_return_sequences=count)
    alone = {"max_new_tokens": 2, "do_sample": False, "verbose": False}
    assert torch.equal(
        shapes.generate(**inputs, **alone, num_return_sequences=1, num_beams=1),
        shapes.generate(**inputs, **alone),
    )


def test_inputs_of_several_conversations(shapes: Any) -> None:
    """They are a batch, as each by itself but for padding on the left."""
    first, second = (sample.messages for sample in ASKED)
    longer = [*first, {"role": "assistant", "content": "yes"}, *second]
    apart = [ml.inputs(shapes, messages) for messages in (first, longer)]
    together = ml.inputs(shapes, [first, longer])
    assert together.keys() == apart[0].keys()
    mask = together["attention_mask"]
    assert mask.sum(1).tolist() == [one["input"].shape[1] for one in apart]
    assert not mask[0, 0]
    for row, one in enumerate(apart):
        real = mask[row].bool()
        assert torch.equal(together["input"][row, real], one["input"][0])
    for name in ("pixel_values", "image_grid_thw"):
        assert torch.equal(together[name], torch.cat([one[name] for one in apart]))
    with torch.no_grad():
        logits = shapes(**together)[:, -1]
        expected = torch.cat([shapes(**one)[:, -1] for one in apart])
    torch.testing.assert_close(logits, expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("make", [lambda m: [m, "Yes?"], lambda m: [m, m[0]], lambda m: [m, []]])
def test_what_are_no_conversations(shapes: Any, make: Any) -> None:
    given = make(ASKED[0].messages)
    for use in (ml.inputs, ml.generate):
        with pytest.raises(ValueError, match=r"a conversation.*or a list of conversations"):
            use(shapes, given)


def test_experiments_ask_for_one_answer(shapes: Any) -> None:
    expected, config = ml.accuracy(shapes, ASKED), shapes.original_model.generation_config
    config.num_beams = config.num_return_sequences = 2
    try:
        assert len(ml.generate(shapes, ASKED[0].messages, 4)) == 2
        assert ml.accuracy(shapes, ASKED) == expected
        assert len(ml.answers(shapes, ASKED)) == 2
    finally:
        config.num_beams = config.num_return_sequences = 1


def batched(model: Any, prompts: list[list[int]]) -> list[list[int]]:
    config = GenerationConfig(max_new_tokens=3, do_sample=False, eos_token_id=98, pad_token_id=0)
    packed = ContinuousBatchingConfig(num_blocks=8, page_size=16, max_batch_tokens=64)
    results = model.generate_batch(
        prompts, generation_config=config, continuous_batching_config=packed
    )
    return [result.generated_tokens for result in results.values()]


def test_continuous_batching() -> None:
    """Where Hugging Face computes attention it works, also ablated; else it is refused at once."""
    prompts = [[5, 6, 7], [8, 9, 10, 11]]

    def apart(model: Any) -> list[list[int]]:
        options = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None}
        made = [model.generate(torch.tensor([ids]), **options)[0] for ids in prompts]
        return [tokens[len(ids) :].tolist() for tokens, ids in zip(made, prompts, strict=True)]

    model = vision_model()
    expected = apart(model)
    bridge = ml.wrap(model)
    assert batched(model, prompts) == expected
    with ml.ablate(bridge, ~ml.NeuronSet.of([(0, 1)], bridge)):
        ablated = apart(model)
        assert batched(model, prompts) == ablated != expected
    rebuilt = llama_model()
    expected = batched(rebuilt, prompts)
    wrapped = ml.wrap(rebuilt)
    with pytest.raises(ValueError, match=r"Continuous batching.*ml\.generate.*ml\.unwrap"):
        batched(rebuilt, prompts)
    assert batched(ml.unwrap(wrapped), prompts) == expected

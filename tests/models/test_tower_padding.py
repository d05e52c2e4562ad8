"""Rows of towers that are padding, in families that tell their towers of it in other ways.

What is real is worked out by hand from the inputs, and X is read off plain transformers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import miner_lens as ml
from miner_lens.data.sample import SampleError
from miner_lens.models.items import Rows, owners_of_rows
from miner_lens.models.structure import part, stacks
from tests.families import AUDIO_TOWER, SIGLIP, VISION, Inputs, build, prompts, text
from tests.towers import AUDIO, IMAGE, TEXT


@dataclass
class Case:
    """A model with inputs whose media are padded.

    Attributes:
        owners: Which sample each row of a site belongs to, [row]; -1 is padding.
    """

    model: Any
    inputs: Inputs
    modality: str
    owners: dict[str, Tensor]


def owned(samples: list[int], real: Tensor) -> Tensor:
    """Rows of items [item row] that belong to a sample each."""
    owner = torch.tensor(samples)[:, None].expand_as(real)
    return owner.masked_fill(~real, -1).flatten()


def patches(mask: Tensor, least: int) -> Tensor:
    """Patches of 4 x 4 pixels in which at least so many are real, [item patch]."""
    counts = mask.long().unfold(-2, 4, 4).unfold(-2, 4, 4).sum((-1, -2))
    return (counts >= least).flatten(-2).flatten(0, -2)


def pictures() -> tuple[Tensor, Tensor]:
    """Two samples of two images each, the last of which fills up its sample."""
    torch.manual_seed(0)
    mask = torch.ones(2, 2, 8, 8, dtype=torch.bool)
    mask[0, 0, :, 4:], mask[1, 0, 6:], mask[1, 1] = False, False, False
    return torch.randn(2, 2, 3, 8, 8) * mask[:, :, None], mask


def idefics2() -> Case:
    """Patches that are real in part are padding."""
    former = {"hidden_size": 32, "resampler_n_latents": 3, "resampler_depth": 2}
    former |= {"resampler_n_heads": 4, "resampler_head_dim": 8, "num_key_value_heads": 2}
    model = build(
        "Idefics2ForConditionalGeneration",
        text_config=text("mistral"),
        vision_config=VISION,
        perceiver_config=former,
        image_token_id=IMAGE,
    )
    pixels, mask = pictures()
    inputs = prompts([(5, 2), (IMAGE, 3), (6, 1), (IMAGE, 3)], [(5, 2), (IMAGE, 3), (7, 1)])
    rows = owned([0, 0, 1], patches(mask, 16)[:3])
    inputs |= {"pixel_values": pixels, "pixel_attention_mask": mask}
    return Case(model, inputs, "image", {"vision": rows, "projector": rows})


def idefics3() -> Case:
    """Patches that are real in part are real."""
    model = build(
        "Idefics3ForConditionalGeneration",
        text_config=text(),
        vision_config=VISION,
        image_token_id=IMAGE,
        scale_factor=2,
    )
    pixels, mask = pictures()
    inputs = prompts([(5, 2), (IMAGE, 2), (6, 1)], [(IMAGE, 1), (7, 3)])
    inputs |= {"pixel_values": pixels, "pixel_attention_mask": mask.long()}
    return Case(model, inputs, "image", {"vision": owned([0, 0, 1], patches(mask, 1)[:3])})


def aria() -> Case:
    experts = {"intermediate_size": 12, "moe_num_experts": 4, "moe_topk": 2}
    model = build(
        "AriaForConditionalGeneration",
        text_config=TEXT | {"model_type": "aria_text"} | experts,
        vision_config=SIGLIP | {"model_type": "idefics3_vision"},
        image_token_index=IMAGE,
        projector_patch_to_query_dict={4: 2},
    )
    torch.manual_seed(0)
    mask = torch.ones(3, 8, 8, dtype=torch.long)
    mask[0, :, 4:], mask[1, 3:] = 0, 0
    inputs = prompts([(5, 2), (IMAGE, 2), (6, 1)], [(IMAGE, 4), (7, 2)])
    inputs |= {"pixel_values": torch.randn(3, 3, 8, 8) * mask[:, None], "pixel_mask": mask}
    return Case(model, inputs, "image", {"vision": owned([0, 1, 1], patches(mask, 1))})


def lfm2_vl() -> Case:
    """Images of any size, laid out as patches."""
    vision = VISION | {"model_type": "siglip2_vision_model", "num_patches": 16}
    model = build(
        "Lfm2VlForConditionalGeneration",
        text_config=text(),
        vision_config=vision | {"vision_use_head": False},
        image_token_id=IMAGE,
        downsample_factor=2,
        projector_hidden_size=24,
    )
    torch.manual_seed(0)
    shapes = torch.tensor([[2, 4], [4, 4], [2, 2]])
    mask = torch.arange(16) < shapes.prod(-1)[:, None]
    inputs = prompts([(5, 2), (IMAGE, 2), (6, 1), (IMAGE, 4)], [(IMAGE, 1), (7, 3)])
    inputs |= {"pixel_values": torch.randn(3, 16, 48), "pixel_attention_mask": mask.long()}
    inputs["spatial_shapes"] = shapes
    return Case(model, inputs, "image", {"vision": owned([0, 0, 1], mask)})


def sounds(frames: int, lengths: list[int], tokens: list[int], *features: int) -> Inputs:
    torch.manual_seed(0)
    mask = (torch.arange(frames) < torch.tensor(lengths)[:, None]).long()
    inputs = prompts([(5, 2), (AUDIO, tokens[0]), (6, 1)], [(8, 2), (AUDIO, tokens[1]), (7, 3)])
    return inputs | {"input_features": torch.randn(*features), "input_features_mask": mask}


def audio_flamingo3() -> Case:
    """Half as many rows as frames in the tower, and half of these after it."""
    model = build(
        "AudioFlamingo3ForConditionalGeneration",
        text_config=text("qwen2"),
        audio_config=AUDIO_TOWER,
        audio_token_id=AUDIO,
    )
    inputs = sounds(40, [40, 13], [10, 3], 2, 8, 40)
    owners = {
        "audio": owned([0, 1], torch.arange(20) < torch.tensor([[20], [7]])),
        "projector": owned([0, 1], torch.arange(10) < torch.tensor([[10], [3]])),
    }
    return Case(model, inputs, "audio", owners)


def fun_asr() -> Case:
    audio = {"num_mel_bins": 4, "num_stacked_frames": 2, "hidden_size": 20, "fsmn_kernel_size": 3}
    audio |= {"num_attention_heads": 4, "intermediate_size": 40, "num_hidden_layers": 3}
    adaptor = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 8}
    model = build(
        "FunAsrNanoForConditionalGeneration",
        text_config=text("qwen3", head_dim=8),
        audio_token_id=AUDIO,
        audio_config=audio | {"num_timestamp_prediction_layers": 1, "max_position_embeddings": 64},
        adaptor_config=adaptor | {"num_hidden_layers": 2, "projector_hidden_size": 28},
    )
    rows = owned([0, 1], torch.arange(10) < torch.tensor([[10], [4]]))
    inputs = sounds(10, [10, 4], [10, 4], 2, 10, 8)
    return Case(model, inputs, "audio", {"audio": rows, "projector": rows})


def qwen3_asr() -> Case:
    """Clips without their padding, in one heap."""
    audio = {"num_mel_bins": 8, "encoder_layers": 3, "encoder_attention_heads": 4, "d_model": 20}
    audio |= {"encoder_ffn_dim": 40, "n_window": 50, "n_window_infer": 200, "output_dim": 32}
    model = build(
        "Qwen3ASRForConditionalGeneration",
        text_config=text("qwen3", head_dim=8),
        audio_token_id=AUDIO,
        audio_config=audio | {"downsample_hidden_size": 6, "max_position_embeddings": 13},
    )
    rows = torch.tensor([0] * 26 + [1] * 9)
    inputs = sounds(200, [200, 70], [26, 9], 2, 8, 200)
    return Case(model, inputs, "audio", {"audio": rows, "projector": rows})


CASES = (idefics2, idefics3, aria, lfm2_vl, audio_flamingo3, fun_asr, qwen3_asr)


def glm_asr() -> tuple[Any, Inputs]:
    """Its tower is not told which frames are padding."""
    model = build(
        "GlmAsrForConditionalGeneration",
        text_config=text("qwen2"),
        audio_config=AUDIO_TOWER,
        audio_token_id=AUDIO,
    )
    return model, sounds(40, [40, 16], [5, 2], 2, 8, 40)


def activations(model: Any, inputs: Inputs, site: str) -> list[Tensor]:
    """X of a site's layers in plain transformers, [row neuron]."""
    (stack,) = (one for one in stacks(model) if one.site == site)
    seen: list[Tensor] = []
    handles = [
        part(model, layer.activation).register_forward_hook(
            lambda m, a, x: seen.append(x.flatten(0, -2).clone())
        )
        for layer in stack.layers
    ]
    with torch.no_grad():
        model(**inputs)
    for handle in handles:
        handle.remove()
    return seen


def mined(bridge: Any, inputs: Inputs, modality: str, **options: Any) -> ml.ImportanceScores:
    token = {"image": IMAGE, "audio": AUDIO}[modality]
    data = [(inputs, {modality: inputs["input_ids"] == token})]
    options = {"metrics": ("prob", "mean", "max"), "progress": False} | options
    scores: ml.ImportanceScores = ml.mine(bridge, data, **options)
    return scores


@pytest.mark.parametrize("make", CASES)
def test_padding_of_towers_is_not_counted(make: Callable[[], Case]) -> None:
    case = make()
    found = {site: activations(case.model, case.inputs, site) for site in case.owners}
    bridge = ml.wrap(case.model)
    for site, owner in case.owners.items():
        scores = mined(bridge, case.inputs, case.modality, site=site)
        assert scores.means is not None
        ours = scores.means[scores.modalities.index(case.modality)]
        for layer, x in enumerate(found[site]):
            means = [x[owner == sample].mean(0) for sample in (0, 1)]
            expected = torch.stack(means).mean(0)
            assert (ours[layer] - expected).abs().max() < 1e-6, (site, layer)


@pytest.mark.parametrize("make", [idefics2, aria])
def test_what_stands_in_padding_changes_no_score(make: Callable[[], Case]) -> None:
    """Nor does it change those of attention."""
    case = make()
    bridge = ml.wrap(case.model)
    pixels = case.inputs["pixel_values"].clone()
    pixels.flatten(0, -4)[0, ..., 4:] = 7.0  # the padded half of the first image
    one, two = (
        mined(bridge, inputs, "image", site="vision", metrics=("mean", "attn_k", "attn_q"))
        for inputs in (case.inputs, case.inputs | {"pixel_values": pixels})
    )
    torch.testing.assert_close(one.values, two.values, atol=1e-6, rtol=0)


@pytest.mark.parametrize("make", [idefics2, aria, lfm2_vl])
def test_the_least_x_is_of_real_rows(make: Callable[[], Case]) -> None:
    case = make()
    (stack,) = (one for one in stacks(case.model) if one.site == "vision")
    owner = case.owners["vision"]
    items = owner.view(-1, len(owner) // 3)

    def write(module: Any, args: Any, x: Tensor) -> Tensor:
        real = (items >= 0)[..., None]
        least = x.masked_fill(~real, torch.inf).amin((1, 2), keepdim=True)
        x = x.clone()
        x[..., :5] = least
        return x

    module = part(case.model, stack.layers[1].activation)
    handle = module.register_forward_hook(write)
    with torch.no_grad():
        expected = case.model(**case.inputs).logits
    handle.remove()
    neurons = ml.NeuronSet.of([(1, n) for n in range(5)], case.model, site="vision")
    with torch.no_grad(), ml.ablate(case.model, neurons, "min"):
        ours = case.model(**case.inputs).logits
    torch.testing.assert_close(ours, expected, atol=1e-6, rtol=0)


def test_masks_that_nobody_reads_are_refused() -> None:
    model, inputs = glm_asr()
    bridge = ml.wrap(model)
    with pytest.raises(SampleError, match="'input_features_mask' says that a part of the media"):
        mined(bridge, inputs, "audio", site="audio")
    whole = inputs | {"input_features_mask": torch.ones(2, 40, dtype=torch.long)}
    whole |= prompts([(AUDIO, 5), (6, 1)], [(AUDIO, 5), (7, 3)])
    assert mined(bridge, whole, "audio", site="audio").samples == 2
    assert mined(bridge, inputs, "audio", site="llm").samples == 2


def test_images_of_other_sizes_find_their_samples() -> None:
    """Four tokens each: one large image, or two small ones."""
    case = lfm2_vl()
    shapes = torch.tensor([[4, 4], [2, 4], [2, 4]])
    mask = torch.arange(16) < shapes.prod(-1)[:, None]
    inputs = prompts([(IMAGE, 4), (6, 1)], [(IMAGE, 4), (7, 1)])
    inputs |= {"pixel_values": torch.randn(3, 16, 48), "spatial_shapes": shapes}
    inputs["pixel_attention_mask"] = mask.long()
    x, owner = activations(case.model, inputs, "vision")[0], owned([0, 1, 1], mask)
    scores = mined(ml.wrap(case.model), inputs, "image", site="vision")
    expected = torch.stack([x[owner == sample].mean(0) for sample in (0, 1)]).mean(0)
    assert scores.means is not None
    assert (scores.means[0][0] - expected).abs().max() < 1e-6


def test_whose_images_are_is_not_guessed() -> None:
    """Eight tokens and four are two images and one of a size, or one large and two small ones."""
    items = torch.arange(3).repeat_interleave(8)
    real = torch.arange(8) < torch.tensor([[8], [2], [2]])
    rows = Rows(torch.ones(24, dtype=torch.bool), items)
    assert owners_of_rows([8, 4], rows, 3)[1] == (0, 0, 1)
    with pytest.raises(ValueError, match="in several ways"):
        owners_of_rows([8, 4], Rows(real.flatten(), items), 3)
    with pytest.raises(ValueError, match="in no way"):
        owners_of_rows([7, 5], rows, 3)
    assert owners_of_rows([0, 5], rows, 3)[1] == (1, 1, 1)

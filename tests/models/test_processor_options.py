"""Options of parts and of processors, against plain Hugging Face processors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import video_utils

import miner_lens as ml
from miner_lens.models import generation
from tests.data.test_media import film
from tests.families import qwen2_5_vl as model_of_qwen2_5_vl
from tests.models.test_messages import (
    gemma3,
    internvl,
    llava,
    mistral3,
    paligemma,
    qwen2_5_omni,
    qwen2_5_vl,
    qwen3_vl,
)
from tests.parts import reader_of

pytestmark = pytest.mark.filterwarnings("ignore:TransformerLens rebuilds")

TEMPLATE = (
    "{% for m in messages %}{% for p in m.content %}"
    "{% if p.type == 'text' %}{{ p.text }}{% elif p.type == 'video' %}<start><video><end>"
    "{% else %}IMAGE{% endif %}{% endfor %}{% endfor %}"
)
LEFT = {"text_kwargs": {"padding": True, "padding_side": "left"}}
NOISE = np.random.default_rng(0).integers(0, 255, (8, 40, 64, 3)).astype(np.uint8)
PICTURE = Image.fromarray(NOISE[0])
FRAMES = [Image.fromarray(frame[:16, :16]) for frame in NOISE]


def model(make: Callable[[], Any], image: str = "<start><image><end>") -> Any:
    processor = make()
    processor.chat_template = TEMPLATE.replace("IMAGE", image)
    return reader_of(processor)


def ask(*parts: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [*parts, {"type": "text", "text": "what is it?"}]}]


def picture(**options: Any) -> dict[str, Any]:
    return {"type": "image", "image": PICTURE, **options}


def moving(**options: Any) -> dict[str, Any]:
    return {"type": "video", "video": FRAMES, **options}


def check_equal(ours: dict[str, Any], theirs: Any) -> None:
    theirs = {name: value for name, value in theirs.items() if name != "labels"}
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert torch.equal(ours[name], value), name


def plain(processor: Any, conversations: Any, **told: Any) -> Any:
    return processor.apply_chat_template(
        conversations,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs=LEFT | told,
    )


@pytest.mark.parametrize("limits", [{"max_pixels": 100}, {"min_pixels": 400, "max_pixels": 900}])
def test_limits_of_pixels_are_those_of_the_processor(limits: dict[str, int]) -> None:
    sees = model(qwen2_5_vl)
    size = {"shortest_edge": 16, "longest_edge": 256}
    size |= {"longest_edge": limits["max_pixels"]}
    size |= {"shortest_edge": limits.get("min_pixels", 16)}
    theirs = plain(sees.processor, [ask({"type": "image", "image": PICTURE})], size=size)
    assert theirs["image_grid_thw"].tolist() != [[1, 6, 10]]
    check_equal(generation.render(sees, [ask(picture(**limits))], False), theirs)
    check_equal(generation.render(sees, [ask(picture())], False, size=size), theirs)
    grouped = generation.render(sees, [ask(picture())], False, images_kwargs={"size": size})
    check_equal(grouped, theirs)
    # Pictures with and without them in one batch are each as by itself.
    batch = [ask(picture(), picture(**limits)), ask(picture()), ask(picture(**limits))]
    together = generation.render(sees, batch, False)
    default = plain(sees.processor, [ask({"type": "image", "image": PICTURE})])
    order = (default, theirs, default, theirs)
    for name in ("pixel_values", "image_grid_thw"):
        assert torch.equal(together[name], torch.cat([one[name] for one in order]))
    for row, messages in enumerate(batch):
        alone = generation.render(sees, [messages], False)["input_ids"][0]
        assert torch.equal(together["input_ids"][row, -len(alone) :], alone)


@pytest.mark.parametrize(("height", "width"), [(30, 50), (64, 64), (2, 12)])
def test_a_size_is_what_the_model_sees(height: int, width: int) -> None:
    sees = model(qwen2_5_vl)
    rounded = [max(4, round(side / 4) * 4) for side in (height, width)]
    expected = sees.processor.image_processor(
        images=[PICTURE.resize(rounded[::-1], Image.Resampling.BICUBIC)],
        do_resize=False,
        return_tensors="pt",
    )
    sized = {"resized_height": height, "resized_width": width}
    ours = generation.render(sees, [ask(picture(**sized))])
    assert torch.equal(ours["pixel_values"], expected["pixel_values"])
    video = generation.render(sees, [ask(moving(**sized))])
    assert video["video_grid_thw"].tolist() == [[4, rounded[0] // 2, rounded[1] // 2]]


@pytest.mark.parametrize("make", [llava, gemma3, mistral3])
def test_options_that_a_processor_has_not_are_refused(make: Callable[[], Any]) -> None:
    for option in ({"max_pixels": 64}, {"resized_height": 8, "resized_width": 8}):
        with pytest.raises(ml.SampleError, match="no limits of pixels"):
            generation.render(model(make, "<image>"), [ask(picture(**option))])
    with pytest.raises(ml.SampleError, match="no option 'max_pixel'"):
        generation.render(model(make, "<image>"), [ask(picture())], max_pixel=64)


TRANSPARENT = Image.fromarray(np.dstack([NOISE[0], NOISE[1, ..., 0]]))
MAKERS = (llava, gemma3, paligemma, internvl, mistral3, qwen2_5_vl, qwen3_vl)


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("mode", ["RGBA", "LA", "L", "P", "CMYK"])
def test_colours_are_those_of_the_processor(make: Callable[[], Any], mode: str) -> None:
    image = TRANSPARENT if "A" in mode else TRANSPARENT.convert("RGB")
    image = image.convert(mode)
    symbol = "<start>" if make is gemma3 else "<image>"
    sees = model(make, symbol)
    part = {"type": "image", "image": image}
    told = {"images_kwargs": {"do_convert_rgb": True}} if make is paligemma else {}
    check_equal(
        generation.render(sees, [ask(part)], False), plain(sees.processor, [ask(part)], **told)
    )


VIDEO_READERS: dict[str, Callable[[], Any]] = {
    "qwen2_5_vl": qwen2_5_vl,
    "qwen3_vl": qwen3_vl,
    "internvl": internvl,
}


@pytest.mark.parametrize("name", VIDEO_READERS)
@pytest.mark.parametrize("asked", [{"num_frames": 6, "fps": None}, {"fps": 4, "num_frames": None}])
def test_sampling_is_that_of_the_processor(
    name: str, asked: dict[str, Any], tmp_path: Path
) -> None:
    path = film(tmp_path / "film.mp4")
    sees = model(VIDEO_READERS[name], "<image>")
    every, metadata = video_utils.load_video(str(path), backend="pyav")
    theirs = sees.processor(
        text=["<start><video><end>what is it?"],
        videos=[[every]],
        video_metadata=[[metadata]],
        do_sample_frames=True,
        return_tensors="pt",
        **asked,
    )
    messages = ask({"type": "video", "video": path})
    check_equal(generation.render(sees, [messages], False, **asked), theirs)
    grouped = {"videos_kwargs": asked | {"do_sample_frames": True}}
    check_equal(generation.render(sees, [messages], False, **grouped), theirs)
    part = {name: value for name, value in asked.items() if value}
    messages = ask({"type": "video", "video": path, **part})
    check_equal(generation.render(sees, [messages], False), theirs)


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl"])
def test_frames_have_the_rate_that_their_part_says(name: str) -> None:
    sees = model(VIDEO_READERS[name])

    def theirs(*rates: float | None) -> Any:
        metadata = [
            {"total_num_frames": 8, "fps": rate, "frames_indices": list(range(8))} for rate in rates
        ]
        return plain(
            sees.processor,
            [ask({"type": "video", "video": FRAMES}) for _ in rates],
            video_metadata=metadata,
            do_sample_frames=False,
        )

    parts = {1.0: moving(fps=1), 4.0: moving(fps="4"), None: moving()}
    for rate, part in parts.items():
        check_equal(generation.render(sees, [ask(part)], False), theirs(rate))
    # Several rates in one batch, and each of them by itself.
    batch = [ask(part) for part in parts.values()]
    together = generation.render(sees, batch, False)
    check_equal(together, theirs(*parts))
    for row, messages in enumerate(batch):
        alone = generation.render(sees, [messages], False)
        ids = alone["input_ids"][0]
        assert torch.equal(together["input_ids"][row, -len(ids) :], ids)
        if name == "qwen2_5_vl":
            assert together["second_per_grid_ts"][row] == alone["second_per_grid_ts"][0]


def test_a_processor_that_takes_one_rate_for_all_videos() -> None:
    sees = model(qwen2_5_omni)
    small = {"resized_height": 16, "resized_width": 16}
    slow, fast = (moving(fps=rate, **small) for rate in (1, 4))
    together = generation.render(sees, [ask(slow), ask(fast)], False)
    assert together["video_second_per_grid"].tolist() == [2, 0.5]
    for row, part in enumerate((slow, fast)):
        alone = generation.render(sees, [ask(part)], False)
        assert torch.equal(alone["video_second_per_grid"], together["video_second_per_grid"][[row]])
        assert torch.equal(alone["input_ids"][0], together["input_ids"][row])
    with pytest.raises(ml.SampleError, match="one fps for all videos"):
        generation.render(sees, [ask(slow, fast)])
    fewer = generation.render(sees, [ask(moving(fps=4, num_frames=4, **small))])
    assert fewer["video_second_per_grid"].tolist() == [1]


def test_text_and_media_in_one_batch(tmp_path: Path) -> None:
    """Logits of each row are those of the sample by itself, in plain Hugging Face too."""
    hf_model, _ = model_of_qwen2_5_vl()
    processor = model(qwen2_5_vl).processor
    for part in (hf_model, processor):
        part.save_pretrained(tmp_path)
    bridge = ml.load(tmp_path, device="cpu")
    batch = [
        ask(picture(max_pixels=100)),
        ask(),
        ask(moving(fps=1), picture()),
        ask(moving(fps=4)),
    ]
    together = generation.prepare_inputs(bridge, batch)
    with torch.no_grad():
        logits = hf_model(**together).logits
        real = together["attention_mask"].bool()
        ours = bridge.original_model(**together).logits
        torch.testing.assert_close(ours[real], logits[real], atol=1e-5, rtol=0)
        for row, messages in enumerate(batch):
            alone = hf_model(**generation.prepare_inputs(bridge, [messages])).logits[0]
            torch.testing.assert_close(logits[row, -len(alone) :], alone, atol=1e-5, rtol=0)
    scores = [
        ml.mine(bridge, list(map(ml.Sample, batch)), batch_size=size, progress=False)
        for size in (1, 4)
    ]
    torch.testing.assert_close(scores[0].values, scores[1].values, atol=1e-5, rtol=0)
    told = {"size": {"shortest_edge": 16, "longest_edge": 64}}
    inputs = ml.inputs(bridge, ask(picture()), **told)
    assert inputs["image_grid_thw"].tolist() == [[1, 2, 4]]
    with torch.no_grad():
        expected = hf_model.generate(
            **generation.prepare_inputs(bridge, [ask(picture())], **told),
            do_sample=False,
            max_new_tokens=3,
        )
    answer = processor.batch_decode(expected[:, inputs["input"].shape[1] :], True)
    assert ml.generate(bridge, ask(picture()), 3, processor_kwargs=told) == answer[0]


def test_text_models_take_options_of_their_tokenizer() -> None:
    tokenizer = qwen2_5_vl().tokenizer
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    reads = reader_of(tokenizer)
    messages = [{"role": "user", "content": "what is it?"}]
    whole, cut = (
        generation.render(reads, [messages], **told)["input_ids"]
        for told in ({}, {"truncation": True, "max_length": 4})
    )
    assert torch.equal(cut, whole[:, :4])
    with pytest.raises(ml.SampleError, match="no option 'max_pixels'"):
        generation.render(reads, [messages], max_pixels=64)

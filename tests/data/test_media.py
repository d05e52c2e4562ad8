"""Media as chat APIs, data sets and arrays write them, from real files made here."""

from __future__ import annotations

import base64
import io
import struct
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image
from transformers import (
    InternVLVideoProcessor,
    Qwen2VLVideoProcessor,
    Qwen3VLVideoProcessor,
    WhisperFeatureExtractor,
    video_utils,
)
from transformers.image_transforms import convert_to_rgb
from transformers.models.glm4v import video_processing_glm4v

import miner_lens as ml
from miner_lens.data.media import load_image, load_media, load_sound, load_video

av = pytest.importorskip("av")

RATE = 16_000
PIXELS = (np.arange(8 * 12 * 3).reshape(8, 12, 3) * 7 % 251).astype(np.uint8)


def png(picture: Image.Image) -> bytes:
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


def text_of(file: bytes) -> str:
    return base64.b64encode(file).decode()


def only(part: dict[str, Any], processor: Any = None) -> Any:
    """The medium of a part, opened."""
    (message,) = load_media([{"role": "user", "content": [part]}], processor)
    opened = message["content"][0]
    return opened[opened["type"]]


def pictures(folder: Path) -> dict[str, dict[str, Any]]:
    file = png(Image.fromarray(PIXELS))
    path = folder / "a picture.png"
    path.write_bytes(file)
    uri = f"data:image/png;base64,{text_of(file)}"
    return {
        "file://": {"type": "image", "image": f"file://{path}"},
        "file:// with escapes": {"type": "image", "url": path.as_uri()},
        "file://localhost": {"type": "image", "image": f"file://localhost{path}"},
        "data URI": {"type": "image", "image": uri},
        "escaped data URI": {
            "type": "image",
            "image": "data:image/png," + "".join(f"%{byte:02x}" for byte in file),
        },
        "base64": {"type": "image", "base64": text_of(file)},
        "base64 in lines": {"type": "image", "image": base64.encodebytes(file).decode()},
        "OpenAI": {"type": "image_url", "image_url": {"url": uri, "detail": "high"}},
        "flat": {"type": "image_url", "image_url": f"file://{path}"},
        "responses": {"type": "input_image", "image_url": uri},
        "url beside": {"type": "image_url", "url": uri},
        "table": {"type": "image", "image": {"bytes": file, "path": None}},
        "path in a table": {"type": "image", "image": {"bytes": None, "path": str(path)}},
        "bytearray": {"type": "image", "image": bytearray(file)},
        "array": {"type": "image", "image": PIXELS},
        "channels first": {"type": "image", "image": PIXELS.transpose(2, 0, 1)},
        "floats": {"type": "image", "image": PIXELS.astype(np.float32) / 255},
        "16 bits": {"type": "image", "image": PIXELS.astype(np.uint16) * 257},
        "tensor": {"type": "image", "image": torch.tensor(PIXELS).permute(2, 0, 1)},
        "float tensor": {"type": "image", "image": torch.tensor(PIXELS).permute(2, 0, 1) / 255},
    }


def test_pictures_wherever_they_are(tmp_path: Path) -> None:
    for name, part in pictures(tmp_path).items():
        opened = only(part)
        assert opened.mode == "RGB", name
        np.testing.assert_array_equal(np.asarray(opened), PIXELS, name)


@pytest.mark.parametrize("kind", ["uint8", "bfloat16", "two axes", "channel"])
def test_grey_arrays(kind: str) -> None:
    grey = PIXELS[..., 0]
    sources: dict[str, Any] = {
        "uint8": grey,
        "bfloat16": torch.tensor(grey // 255).bfloat16(),
        "two axes": grey / 255,
        "channel": grey[..., None],
    }
    expected = (grey // 255 * 255) if kind == "bfloat16" else grey
    np.testing.assert_array_equal(np.asarray(load_image(sources[kind]))[..., 2], expected)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (np.zeros((3, 8, 3), np.uint8), "first or last"),
        (np.zeros((8, 8, 2), np.uint8), r"not \[8, 8, 2\]"),
        (np.zeros((1, 3, 8, 8), np.uint8), r"not \[1, 3, 8, 8\]"),
        (np.zeros((0, 8, 3), np.uint8), "empty"),
        (np.full((8, 8), 200.0), "between 0 and 1, not between 200 and 200"),
        (np.full((8, 8), -0.5), "between 0 and 1"),
        (np.full((8, 8), np.nan), "between 0 and 1"),
        (np.zeros((8, 8), np.int64), "not int64"),
        (np.zeros((8, 8), bool), "not bool"),
        (Image.fromarray(np.full((8, 8), 70_000, np.int32)), "0 to 65535"),
        ("https://example.org/" + "a" * 9_000, "Nothing is fetched"),
        ("s3://bucket/picture.png", "Nothing is fetched"),
        ("data:image/png;base64,%%%", "data URI is"),
        ("data:image/png;base64", "data URI is"),
        ("no/such/picture/of/many/letters/and/no/dot", "Cannot read an image"),
        ("data:image/png;base64," + text_of(bytes(999_999)), "999999 bytes"),
        ("/" + "a.b" * 99_999, "299998 characters"),
        (None, "not NoneType"),
    ],
)
def test_refused_pictures(source: Any, message: str) -> None:
    with pytest.raises(ml.SampleError, match=message) as refusal:
        only(
            {"type": "image_url", "image_url": source} if source is not None else {"type": "image"}
        )
    assert len(str(refusal.value)) < 500


RAMP = np.linspace(0, 65_535, 64).reshape(8, 8)


@pytest.mark.parametrize(
    ("values", "file", "mode"),
    [
        (RAMP.astype(np.uint16), "PNG", "I;16"),
        (RAMP.astype(np.uint16), "TIFF", "I;16"),
        (RAMP.astype(np.uint16), "PPM", "I"),
        (RAMP.astype(np.int32), "TIFF", "I"),
        ((RAMP / 65_535).astype(np.float32), "TIFF", "F"),
        (RAMP.astype(np.float32), "TIFF", "F"),
        ((RAMP / 257).astype(np.float32), "TIFF", "F"),
    ],
)
def test_deep_pictures_are_scaled(values: np.ndarray, file: str, mode: str) -> None:
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, file)
    with Image.open(buffer) as picture:
        assert picture.mode == mode
    expected = np.rint(RAMP / 257)
    for source in (buffer.getvalue(), Image.open(buffer)):
        heights = np.asarray(load_image(source)).astype(float)
        assert np.abs(heights - expected[..., None]).max() <= 1


def test_a_dark_picture_of_16_bits_stays_dark() -> None:
    dark = np.full((8, 8), 255, np.uint16)
    for file in ("PNG", "PPM"):
        buffer = io.BytesIO()
        Image.fromarray(dark).save(buffer, file)
        assert np.asarray(load_image(buffer.getvalue())).max() == 1
    # Integers of 32 bits that nobody scaled are what Pillow takes them for.
    assert np.asarray(load_image(Image.fromarray(dark.astype(np.int32)))).min() == 255


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "CMYK", "1", "YCbCr"])
def test_colours_are_those_of_hugging_face(mode: str) -> None:
    alpha = np.linspace(0, 255, 96).reshape(8, 12).astype(np.uint8)
    picture = Image.fromarray(np.dstack([PIXELS, alpha]))
    if mode == "P":
        picture = picture.convert("RGB").quantize(7)
        picture.info["transparency"] = 3
    elif mode != "RGBA":
        picture = (picture if mode == "LA" else picture.convert("RGB")).convert(mode)
    expected = convert_to_rgb(picture, return_numpy=True)
    np.testing.assert_array_equal(np.asarray(load_image(picture)), expected)
    if mode in ("RGBA", "LA", "P"):
        saved = np.asarray(load_image(png(picture)))
        np.testing.assert_array_equal(saved, expected)
        assert (saved != np.asarray(picture.convert("RGB"))).any()


def test_transparency_is_left_to_processors_that_see_to_it() -> None:
    picture = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    own, others = (
        SimpleNamespace(image_processor=SimpleNamespace(do_convert_rgb=does))
        for does in (True, None)
    )
    assert load_image(picture, own).mode == "RGBA"
    assert load_image(picture, others).getpixel((0, 0)) == (255, 255, 255)


def test_an_animation_is_its_first_frame_or_a_video(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (16, 16), (40 * n,) * 3) for n in range(4)]
    path = tmp_path / "moving.gif"
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=100)
    assert load_image(path).getpixel((0, 0)) == (0, 0, 0)
    opened, metadata = load_video(path)
    assert metadata["total_num_frames"] == len(opened) == 4
    assert opened[3].max() >= 100


def film(path: Path, frames: int = 30, rate: int = 10, codec: str = "mpeg4") -> Path:
    """A video whose frames become lighter."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate)
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv420p"
        for number in range(frames):
            shade = np.full((64, 64, 3), 250 * number // frames, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(shade, "rgb24")))
        container.mux(stream.encode())
    return path


@pytest.mark.parametrize(
    ("ending", "codec"),
    [("mkv", "mpeg4"), ("webm", "libvpx"), ("ts", "mpeg2video"), ("flv", "flv"), ("mp4", "mpeg4")],
)
def test_frames_are_counted_where_a_header_does_not_say(
    tmp_path: Path, ending: str, codec: str
) -> None:
    path = film(tmp_path / f"film.{ending}", 12, 25, codec)
    with av.open(str(path)) as container:
        shades = [float(f.to_ndarray(format="rgb24").mean()) for f in container.decode(video=0)]
    assert len(shades) == 12
    for source in (path, path.read_bytes(), f"data:video/x;base64,{text_of(path.read_bytes())}"):
        frames, metadata = load_video(source)
        assert metadata["total_num_frames"] == 12
        assert metadata["fps"] == 25
        np.testing.assert_allclose(frames.mean((1, 2, 3)), shades)
    reader = SimpleNamespace(video_processor=Qwen2VLVideoProcessor(num_frames=4, fps=None))
    frames, metadata = load_video(path, reader, {"num_frames": 4})
    assert metadata["frames_indices"] == [0, 3, 6, 9]
    np.testing.assert_allclose(frames.mean((1, 2, 3)), [shades[n] for n in (0, 3, 6, 9)])


@pytest.mark.parametrize("says", [12, 99])
def test_a_header_that_lies(tmp_path: Path, says: int) -> None:
    file = film(tmp_path / "film.avi", 37).read_bytes()
    lies = file.replace(struct.pack("<I", 37), struct.pack("<I", says), 2)
    with av.open(io.BytesIO(lies)) as container:
        assert container.streams.video[0].frames == says
    frames, metadata = load_video(lies)
    assert metadata["total_num_frames"] == len(frames) == 37


def test_a_file_without_pictures(tmp_path: Path) -> None:
    path = tmp_path / "tone.wav"
    soundfile.write(path, np.zeros(RATE), RATE)
    with pytest.raises(ml.SampleError, match="no pictures"):
        load_video(path)


SAMPLERS: dict[str, Callable[[], Any]] = {
    "qwen2": lambda: Qwen2VLVideoProcessor(do_sample_frames=True, fps=2),
    "qwen2 number": lambda: Qwen2VLVideoProcessor(do_sample_frames=True, num_frames=6),
    "qwen3": lambda: Qwen3VLVideoProcessor(),
    "qwen3 number": lambda: Qwen3VLVideoProcessor(fps=None, num_frames=6),
    "internvl": lambda: InternVLVideoProcessor(do_sample_frames=True, fps=2),
    "internvl number": lambda: InternVLVideoProcessor(do_sample_frames=True, num_frames=5),
    "repeats a frame": lambda: video_processing_glm4v.Glm4vVideoProcessor(fps=1),
}


@pytest.mark.parametrize("name", SAMPLERS)
def test_files_are_sampled_as_the_processor_samples_them(tmp_path: Path, name: str) -> None:
    path = film(tmp_path / "film.mp4")
    reader = SAMPLERS[name]()
    every, known = video_utils.load_video(str(path), backend="pyav")
    expected, (metadata,) = reader._decode_and_sample_videos(
        [every],
        video_metadata=[known],
        do_sample_frames=True,
        sample_indices_fn=lambda metadata: reader.sample_frames(
            metadata, num_frames=reader.num_frames, fps=None if reader.num_frames else reader.fps
        ),
    )
    if name == "repeats a frame":
        assert len(set(map(int, metadata.frames_indices))) < len(metadata.frames_indices)
    frames, ours = load_video(path, SimpleNamespace(video_processor=reader))
    assert ours["frames_indices"] == [int(index) for index in metadata.frames_indices]
    np.testing.assert_array_equal(frames, expected[0])


@pytest.mark.parametrize("name", ["qwen2", "qwen2 number", "qwen3", "internvl", "internvl number"])
def test_a_part_says_how_it_is_sampled(tmp_path: Path, name: str) -> None:
    path = film(tmp_path / "film.mp4")
    processor = SimpleNamespace(video_processor=SAMPLERS[name]())
    for options, count in (({"num_frames": 4}, 4), ({"nframes": 8}, 8), ({"fps": "4"}, 12)):
        part = {"type": "video", "video": str(path), **options}
        assert len(only(part, processor)) == count
    frames, _ = load_video(path, processor, call={"do_sample_frames": False})
    assert len(frames) == 30
    if name == "internvl":  # which has no fps or num_frames that would be in the way
        frames, _ = load_video(path, processor, call={"num_frames": 3, "fps": None})
        assert len(frames) == 3


def test_frames_have_a_rate_and_can_be_sampled() -> None:
    processor = SimpleNamespace(video_processor=Qwen2VLVideoProcessor())
    frames = np.stack([np.full((16, 16, 3), 20 * n, np.uint8) for n in range(8)])
    for source in (frames, torch.tensor(frames), list(frames), tuple(map(Image.fromarray, frames))):
        opened, metadata = load_video(source, processor, {"fps": 4.0, "num_frames": 4})
        assert metadata == {"total_num_frames": 8, "fps": 4, "frames_indices": [0, 2, 4, 6]}
        assert [frame.getpixel((0, 0))[0] for frame in opened] == [0, 40, 80, 120]
    (message,) = load_media(
        [{"role": "user", "content": [{"type": "video", "video": frames, "sample_fps": 2}]}],
        processor,
    )
    assert message["content"][0]["metadata"]["fps"] == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_frames": 4}, "Glm4vVideoProcessor samples frames without 'num_frames'"),
        ({"fps": 0}, "'fps' must be a number above 0, not 0"),
        ({"fps": "fast"}, "not 'fast'"),
        ({"video_start": 2}, "'video_start' of a video is not supported"),
        ({"max_pixels": 64}, "no limits of pixels"),
    ],
)
def test_refused_options(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    path = film(tmp_path / "film.mp4", 4)
    processor = SimpleNamespace(video_processor=video_processing_glm4v.Glm4vVideoProcessor())
    with pytest.raises(ml.SampleError, match=message):
        only({"type": "video", "video": path, **options}, processor)


def test_sounds_wherever_they_are(tmp_path: Path) -> None:
    processor = SimpleNamespace(feature_extractor=WhisperFeatureExtractor(feature_size=8))
    tone = np.sin(np.arange(RATE) / 9).astype(np.float32) / 3
    path = tmp_path / "tone.wav"
    soundfile.write(path, tone, RATE, subtype="FLOAT")
    file = text_of(path.read_bytes())
    parts: list[dict[str, Any]] = [
        {"type": "input_audio", "input_audio": {"data": file, "format": "wav"}},
        {"type": "input_audio", "input_audio": f"data:audio/wav;base64,{file}"},
        {"type": "audio_url", "audio_url": {"url": f"data:audio/wav;base64,{file}"}},
        {"type": "audio", "audio": f"file://{path}"},
        {"type": "audio", "base64": file},
        {"type": "audio", "audio": {"bytes": path.read_bytes(), "path": None}},
        {"type": "audio", "audio": torch.tensor(tone), "sampling_rate": RATE},
    ]
    for part in parts:
        np.testing.assert_array_equal(only(part, processor), tone)
    with pytest.raises(ml.SampleError, match="9999 bytes") as refusal:
        only({"type": "input_audio", "input_audio": {"data": text_of(bytes(9_999))}}, processor)
    assert len(str(refusal.value)) < 300
    # As long as Hugging Face's own loader makes it.
    assert len(load_sound(tone[:-1], 44_100, processor)) == -(-(RATE - 1) * RATE // 44_100)

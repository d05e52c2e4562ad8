"""Pictures: files, PIL images, arrays and tensors, with 8 bits a channel and upright."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from miner_lens.data.sample import SampleError
from miner_lens.data.sources import describe, locate, open_source

_CHANNELS = (1, 3, 4)
_WHITE = (255, 255, 255, 255)


def load_image(source: Any, processor: Any = None) -> Image.Image:
    """Open a picture, upright as its EXIF data say.

    Args:
        source: A PIL image, a path, an image file's bytes, a data URI, or an array or tensor
            `[height width]`, `[height width channel]` or `[channel height width]` of integers with
            8 or 16 bits or of floats from 0 to 1. An animation gives its first frame.
        processor: The processor that will read the picture. One that makes pictures RGB itself
            is given transparent ones as they are.

    Returns:
        A picture in RGB, transparency laid on white, as Hugging Face's image processors lay it.
        16-bit pictures are scaled to 8 bits.

    Raises:
        SampleError: The picture cannot be read, or its scale or axes are ambiguous.
    """
    source = locate(source)
    if hasattr(source, "detach"):
        tensor = source.detach().cpu()
        source = (tensor.float() if tensor.is_floating_point() else tensor).numpy()
    reader = getattr(processor, "image_processor", None)
    try:
        if isinstance(source, np.ndarray):
            picture = _colors(_picture_of(source), reader)
        elif isinstance(source, Image.Image):
            picture = _colors(source, reader)
        elif isinstance(source, str | Path | bytes):
            with Image.open(open_source(source)) as image:
                picture = _colors(image, reader)
        else:
            raise SampleError(
                "An image must be a PIL image, a path, bytes, a data URI, an array or a tensor, "
                f"not {type(source).__name__}."
            )
        return picture
    except SampleError:
        raise
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        what = f"Cannot read an image from {describe(source)}"
        raise SampleError(f"{what}: {error!s:.200}") from error


def _colors(image: Image.Image, reader: Any) -> Image.Image:
    """Turn a picture upright, and make it RGB unless it is transparent and the reader does."""
    picture = ImageOps.exif_transpose(image)
    if picture.mode.startswith("I;16") or picture.mode in ("I", "F"):
        picture = _eight_bits(picture, image.format)
    if "A" in picture.getbands() or picture.info.get("transparency") is not None:
        transparent = picture if picture.mode == "RGBA" else picture.convert("RGBA")
        if getattr(reader, "do_convert_rgb", False):
            return transparent
        white = Image.new("RGBA", picture.size, _WHITE)
        picture = Image.alpha_composite(white, transparent)
    return picture.convert("RGB")


def _eight_bits(picture: Image.Image, file: str | None) -> Image.Image:
    """Scale a picture of one channel whose mode does not say what is white."""
    values = np.asarray(picture).astype(np.float64)
    least, most = float(values.min()), float(values.max())
    if not 0 <= least <= most <= 65_535:
        raise SampleError(
            f"A picture in mode {picture.mode!r} must hold values from 0 to 65535, not from "
            f"{least:.6g} to {most:.6g}: scale it to 8 bits."
        )
    if picture.mode == "F" and most <= 1:
        white = 1
    # PIL opens 16-bit PGM files in mode I.
    elif picture.mode.startswith("I;16") or most > 255 or file == "PPM":
        white = 65_535
    else:
        white = 255
    return Image.fromarray(np.rint(values * (255 / white)).astype(np.uint8))


def _picture_of(array: np.ndarray) -> Image.Image:
    if array.ndim == 3:
        first, last = array.shape[0] in _CHANNELS, array.shape[-1] in _CHANNELS
        if first and last:
            raise SampleError(
                f"A picture of shape {list(array.shape)} may have its channels first or last: give "
                "a PIL image instead."
            )
        if first:
            array = np.moveaxis(array, 0, -1)
        if array.shape[-1] == 1:
            array = array[..., 0]
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[-1] not in _CHANNELS):
        raise SampleError(
            "A picture must be [height width], [height width channel] or [channel height width] "
            f"with 1, 3 or 4 channels, not {list(array.shape)}."
        )
    if array.size == 0:
        raise SampleError(f"A picture must not be empty, as {list(array.shape)} is.")
    if array.dtype == np.uint16:
        array = array / 65_535
    if array.dtype.kind == "f":
        # NaN is neither.
        if not (array.min() >= 0 and array.max() <= 1):
            raise SampleError(
                "A picture of floats must lie between 0 and 1, not between "
                f"{array.min():.4g} and {array.max():.4g}: scale it, or give integers of 8 bits."
            )
        array = np.rint(array.astype(np.float64) * 255).astype(np.uint8)
    if array.dtype != np.uint8:
        raise SampleError(
            f"A picture must be integers of 8 or 16 bits or floats from 0 to 1, not {array.dtype}."
        )
    return Image.fromarray(np.ascontiguousarray(array))

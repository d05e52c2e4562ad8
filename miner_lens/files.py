"""Files that results live in: safetensors with JSON metadata, written whole or not at all."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

FORMAT = 1
HEADER = {"kind", "format", "checksum", "metadata"}
_KEY = "miner_lens"


def write(
    path: str | os.PathLike[str], kind: str, tensors: Mapping[str, Tensor], metadata: Any
) -> None:
    """Write tensors and JSON metadata to one safetensors file.

    The file appears under its name only when it is complete and on disk, so that a crash
    leaves the previous one. Missing parent folders are made.

    Args:
        path: The file.
        kind: What it holds, as `read` will be asked for it.
        tensors: Tensors by name, on any device.
        metadata: Anything JSON can hold.

    Raises:
        TypeError: If the metadata is not JSON.
        OSError: If the disk is full, or the file cannot be written for another reason.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; name a file to write to.")
    data = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    try:
        text = json.dumps(metadata)
    except TypeError as error:
        raise TypeError(
            f"The metadata of {path.name} must be JSON (strings, numbers, lists, dicts): {error}"
        ) from error
    header = {
        "kind": kind,
        "format": FORMAT,
        "checksum": _checksum(data, text),
        "metadata": text,
    }
    try:
        with whole(path) as temporary:
            save_file(data, temporary, metadata={_KEY: json.dumps(header)})
    except SafetensorError as error:
        raise OSError(
            f"{path} could not be written ({error}). What was there before is intact; make room, "
            f"or give another folder, and try again."
        ) from error


@contextmanager
def whole(path: str | os.PathLike[str]) -> Iterator[str]:
    """A temporary name to write under; the file gets its own when it is complete and on disk.

    Missing parent folders are made. After an error what was there before is intact.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fchmod(file.fileno(), 0o666 & ~_umask())  # mkstemp's files are private
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def sync_folder(folder: Path) -> None:
    """Put the new name on disk too, where folders can be synchronised."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    except OSError as error:
        # Some network file systems do not know it.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)


def read(path: str | os.PathLike[str], kind: str) -> tuple[dict[str, Tensor], Any]:
    """Read what `write` wrote, on the CPU: the tensors and the metadata.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is damaged, holds something else, or is of a newer version.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}.")
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {}).get(_KEY, "null"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, ValueError, OSError) as error:
        raise ValueError(
            f"{path} is not a complete safetensors file ({error}). "
            f"It may be cut off or of another format; save or download it again."
        ) from error
    if not (isinstance(header, dict) and header.keys() >= HEADER):
        raise ValueError(
            f"{path} is a safetensors file, but miner-lens did not write it; expected {kind}."
        )
    if header["kind"] != kind:
        raise ValueError(
            f"{path} holds {header['kind']}, not {kind}. Load it with {header['kind']}.load(...)."
        )
    check_format(path, header["format"])
    if header["checksum"] != _checksum(tensors, header["metadata"]):
        raise ValueError(
            f"{path} is damaged: its checksum does not fit its content. Save or download it again."
        )
    return tensors, json.loads(header["metadata"])


def check_format(path: str | os.PathLike[str], found: int) -> None:
    """Refuse a file of a newer format.

    Raises:
        ValueError: It is one.
    """
    if found > FORMAT:
        raise ValueError(
            f"{path} has format {found}; this miner-lens reads up to {FORMAT}. "
            f"Upgrade with pip install -U miner-lens."
        )


def kind_of(path: str | os.PathLike[str]) -> str:
    """What a file holds that `write` wrote, as `read` is asked for it.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no such file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}.")
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {}).get(_KEY, "null"))
    except (SafetensorError, ValueError, OSError) as error:
        raise ValueError(f"{path} is not a complete safetensors file ({error}).") from error
    if not (isinstance(header, dict) and header.keys() >= HEADER):
        raise ValueError(f"{path} is a safetensors file, but miner-lens did not write it.")
    return str(header["kind"])


def _checksum(tensors: Mapping[str, Tensor], text: str) -> str:
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask

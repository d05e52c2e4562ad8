"""The user's cache: folders that are written once, whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import platformdirs
from filelock import FileLock
from safetensors import SafetensorError

from miner_lens.files import sync_folder

VARIABLE = "MINER_LENS_CACHE"
# The sizes of a folder's files, written last.
LIST = "complete.json"


def root() -> Path:
    """Where folders are kept: what MINER_LENS_CACHE names, or the user's cache."""
    named = os.environ.get(VARIABLE)
    return Path(named).expanduser() if named else Path(platformdirs.user_cache_dir("miner-lens"))


def folder(name: str, write: Callable[[Path], None]) -> Path:
    """The folder of that name in the cache; written now unless it is there already.

    It is written under another name and renamed when it is complete and on disk, so that a crash
    leaves nothing under its own. Of several processes one writes, and the others wait. A folder
    that has lost a file, or part of one, is written anew.

    Args:
        name: Says what is in it, version included: what is there already is not compared.
        write: Fills the empty folder that it is given.

    Raises:
        OSError: It cannot be written: no space, or no permission.
    """
    path = root() / name
    if is_complete(path):
        return path
    partial = root() / f".{name}.partial"
    try:
        root().mkdir(parents=True, exist_ok=True)
        with FileLock(root() / f".{name}.lock"):
            if is_complete(path):  # another process wrote it meanwhile
                return path
            _remove(partial)  # of a process that was killed
            try:
                partial.mkdir()
                write(partial)
                _finish(partial)
                _remove(path)
                partial.rename(path)
                sync_folder(root())
            finally:
                _remove(partial)
    except (OSError, SafetensorError) as error:
        raise OSError(
            f"{path} could not be written ({error}). Make room, or let the environment variable "
            f"{VARIABLE} name a folder elsewhere, and try again."
        ) from error
    return path


def is_complete(path: Path) -> bool:
    """Whether a folder has all the files that were written to it, in full length."""
    try:
        sizes = json.loads((path / LIST).read_text())
        return all((path / name).stat().st_size == size for name, size in sizes.items())
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return False


def _finish(path: Path) -> None:
    """Put all files on disk, and the list of them."""
    files = [file for file in path.rglob("*") if file.is_file()]
    sizes = {file.relative_to(path).as_posix(): file.stat().st_size for file in files}
    (path / LIST).write_text(json.dumps(sizes, indent=1))
    for file in (*files, path / LIST):
        with file.open("rb+") as handle:
            os.fsync(handle)
    sync_folder(path)


def _remove(path: Path) -> None:
    if path.exists():
        shutil.rmtree(path)

"""Let a run continue where it was stopped."""

from __future__ import annotations

import hashlib
import time
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from miner_lens import files
from miner_lens.sample import Sample

KIND = "run"
SLOTS = ("state-0.safetensors", "state-1.safetensors")


class Checkpoint:
    """The states of a run's analyzers on disk, with what is needed to continue safely.

    Two files are written in turn, each whole or not at all, so that there is an intact one at any
    moment, also while the other is being written or if it is damaged later.

    Args:
        folder: Where the files are; made if needed.
        every: Seconds between two writes; 0 writes after each forward pass.
        settings: What must be the same for a run to be continued, as JSON can hold it.
    """

    def __init__(self, folder: str | Path, every: float, settings: dict[str, Any]) -> None:
        self.folder = Path(folder)
        self.every = every
        self.settings = settings
        self.samples = 0
        self.skipped = 0
        self._digest = hashlib.sha256()
        self._expected = ""
        self._writes = 0
        self._written = time.monotonic()

    def restore(self, analyzers: Sequence[Any]) -> int:
        """Put the newest intact states into the analyzers.

        Returns:
            How many samples they have seen; `pass_over` must be given as many.

        Raises:
            ValueError: The files are of a run with other settings, or all are damaged.
        """
        newest = self._newest()
        if newest is None:
            return 0
        tensors, metadata = newest
        if metadata["settings"] != self.settings:
            raise ValueError(
                f"{self.folder} holds another run. Its settings: {metadata['settings']}; this "
                f"run's: {self.settings}. Use the same ones, or another folder."
            )
        for index, analyzer in enumerate(analyzers):
            prefix = f"{index}/"
            state = {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}
            analyzer.restore(state)
        self._expected = metadata["digest"]
        self._writes = metadata["writes"]
        self.skipped = metadata["skipped"]
        return int(metadata["samples"])

    def pass_over(self, items: Iterable[Any]) -> None:
        """Take the samples that were seen before the run was stopped.

        Raises:
            ValueError: They are not the ones that the checkpoint has seen.
        """
        self._count(items)
        if self._digest.hexdigest() != self._expected:
            raise ValueError(
                f"{self.folder} was written over other data: its first {self.samples} samples "
                "differ from the ones given now. Give the same data in the same order, or another "
                "folder."
            )

    def update(self, items: Sequence[Any], skipped: int, analyzers: Sequence[Any]) -> None:
        """Count samples that the analyzers have just folded, and write when it is time."""
        self._count(items)
        self.skipped += skipped
        if time.monotonic() - self._written >= self.every:
            self.write(analyzers)

    def write(self, analyzers: Sequence[Any]) -> None:
        """Write the states; the file before this one stays until the next write."""
        tensors = {
            f"{index}/{name}": tensor
            for index, analyzer in enumerate(analyzers)
            for name, tensor in analyzer.state().items()
        }
        self._writes += 1
        metadata = {
            "samples": self.samples,
            "skipped": self.skipped,
            "digest": self._digest.hexdigest(),
            "writes": self._writes,
            "settings": self.settings,
        }
        files.write(self.folder / SLOTS[self._writes % 2], KIND, tensors, metadata)
        self._written = time.monotonic()

    def _count(self, items: Iterable[Any]) -> None:
        for item in items:
            self.samples += 1
            self._digest.update(_signature(item))

    def _newest(self) -> tuple[dict[str, Tensor], Any] | None:
        intact, damaged = [], []
        for name in SLOTS:
            if not (self.folder / name).exists():
                continue
            try:
                intact.append(files.read(self.folder / name, KIND))
            except ValueError as error:
                damaged.append(str(error))
        if damaged and not intact:
            raise ValueError(f"No intact checkpoint in {self.folder}: {' '.join(damaged)}")
        for problem in damaged:
            warnings.warn(f"Continuing from the checkpoint before: {problem}", stacklevel=2)
        return max(intact, key=lambda found: int(found[1]["writes"]), default=None)


def _signature(item: Any) -> bytes:
    """What tells one sample from another, without opening its media."""
    if isinstance(item, Sample):
        return repr((item.id, [_words(message) for message in item.messages])).encode() + b"\n"
    inputs = item[0]
    ids = inputs["input_ids"] if "input_ids" in inputs else inputs["input"]
    return bytes(ids.cpu().contiguous().numpy().tobytes()) + b"\n"


def _words(message: Any) -> Any:
    content = message["content"]
    if isinstance(content, str):
        return content
    return [part.get("text", part.get("type")) for part in content]

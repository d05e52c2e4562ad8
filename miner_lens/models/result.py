"""Results that belong to a model, as files."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, Self

from torch import Tensor

from miner_lens import files
from miner_lens.models.identity import ModelIdentity


class Result(ABC):
    """A result that knows which model it belongs to, and that one file holds.

    A subclass says what there is to write, and makes itself of that again.
    """

    identity: ModelIdentity | None

    @abstractmethod
    def to_parts(self) -> tuple[Mapping[str, Tensor | None], dict[str, Any]]:
        """The tensors by name, and all else but the identity as JSON can hold it."""

    @classmethod
    @abstractmethod
    def from_parts(
        cls,
        tensors: Mapping[str, Tensor],
        metadata: Mapping[str, Any],
        identity: ModelIdentity | None,
    ) -> Self:
        """What `to_parts` was called on; tensors that were None are missing."""

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write to a safetensors file; all but the tensors is in its metadata, as JSON."""
        tensors, metadata = self.to_parts()
        known = {name: tensor for name, tensor in tensors.items() if tensor is not None}
        identity = None if self.identity is None else self.identity.to_dict()
        files.write(path, type(self).__name__, known, metadata | {"identity": identity})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If the file is damaged or holds something else.
        """
        tensors, metadata = files.read(path, cls.__name__)
        identity = metadata["identity"]
        known = None if identity is None else ModelIdentity.from_dict(identity)
        return cls.from_parts(tensors, metadata, known)

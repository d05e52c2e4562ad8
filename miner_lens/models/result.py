"""Results that belong to a model, as files, and on the Hugging Face hub."""

from __future__ import annotations

import json
import os
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from huggingface_hub import ModelCard, ModelHubMixin, hf_hub_download
from torch import Tensor

from miner_lens import files
from miner_lens.models.card import LIBRARY, card, code
from miner_lens.models.identity import ModelIdentity
from miner_lens.notebook import as_html

if TYPE_CHECKING:
    import pandas as pd


class Result(ModelHubMixin, ABC):
    """A result that knows which model it belongs to, and that one file holds.

    `save` and `load` are of one file; `save_pretrained`, `from_pretrained` and `push_to_hub` are of
    a folder or a hub repository with a card, and huggingface_hub's own. A subclass says what there
    is to write, and makes itself of that again.

    Attributes:
        identity: The model that it belongs to, where it is known.
        filename: What its file is called in a folder or a hub repository.
    """

    identity: ModelIdentity | None
    filename: ClassVar[str]

    # Of the class, as results are frozen: the mixin would set it on each.
    _hub_mixin_config = {"library_name": LIBRARY}  # noqa: RUF012

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

    @abstractmethod
    def overview(self) -> pd.DataFrame:
        """What there is to say of it in a few rows, as a notebook shows it."""

    def _repr_html_(self) -> str:
        return as_html(repr(self).partition("\n")[0], self.overview())

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

    def generate_model_card(self, *args: Any, **kwargs: Any) -> ModelCard:
        """The card that a folder or hub repository of it gets, unless it has one."""
        kind = type(self).__name__
        model = None if self.identity is None else self.identity.name
        call = f'import miner_lens as ml\n\nresult = ml.{kind}.from_pretrained("owner/name")'
        about = (
            "Computed with miner-lens, which finds modality-specific neurons in multimodal "
            "language models by MINER ([arXiv 2410.04819](https://arxiv.org/abs/2410.04819))."
        )
        title = f"{kind} of {model}" if model else kind
        return card(title, [about, code(repr(self)), "To load it:", code(call, "python")], model)

    def _save_pretrained(self, save_directory: Path) -> None:
        """What the mixin has a class write into the folder."""
        self.save(save_directory / self.filename)
        identity = None if self.identity is None else self.identity.to_dict()
        # The hub counts downloads of this file.
        config = {"library_name": LIBRARY, "kind": type(self).__name__, "mined_on": identity}
        (save_directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")

    @classmethod
    def _from_pretrained(
        cls, *, model_id: str, subfolder: str | None = None, **options: Any
    ) -> Self:
        """What the mixin has a class read from a folder or the hub."""
        if Path(model_id).is_dir():
            return cls.load(Path(model_id, subfolder or "", cls.filename))
        names = ("revision", "cache_dir", "force_download", "token", "local_files_only")
        known = {name: options[name] for name in names}
        return cls.load(hf_hub_download(model_id, cls.filename, subfolder=subfolder, **known))

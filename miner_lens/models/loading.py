"""Load a checkpoint, with its processor, as a bridge."""

from __future__ import annotations

import difflib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from miner_lens import organisms
from miner_lens.models.bridge import has_adapter, require_class, wrap
from miner_lens.models.devices import default_device

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

# Options of `from_pretrained` that say where to read from and whom to trust.
SHARED = (
    "cache_dir",
    "code_revision",
    "force_download",
    "local_files_only",
    "proxies",
    "subfolder",
    "token",
    "trust_remote_code",
)


def load(
    name_or_path: str | Path,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype = "auto",
    device_map: str | dict[str, Any] | None = None,
    revision: str | None = None,
    check: bool = True,
    **options: Any,
) -> TransformerBridge:
    """Load a multimodal model and its processor, ready to be mined.

    Args:
        name_or_path: A checkpoint folder, a hub id, or the name of a model organism that comes
            with this package (`"shapes"`).
        device: Where to put the model; default the accelerator if there is one.
        dtype: Weight dtype; default the checkpoint's own.
        device_map: Hugging Face device map, for a model larger than one device.
        revision: Hub branch, tag or commit.
        check: Compare the logits of a short prompt with those of the plain model; see `wrap`.
        options: Passed on to Hugging Face's `from_pretrained`, such as `attn_implementation`,
            `quantization_config` or `torch_dtype`, an older name of `dtype`. What says where to
            read from and whom to trust (`cache_dir`, `token`, `trust_remote_code`, ...) goes to
            the config and the processor too.

    Returns:
        A `TransformerBridge` with `.processor` and `.modality_layout`. The logits of Qwen2-VL and
        Qwen2-Audio equal those of the plain Hugging Face model bit for bit.

    Raises:
        FileNotFoundError: There is no such folder, it has no `config.json`, or the name is close to
            that of a model that comes with this package. The hub is not asked.
        OSError: The hub has no such model, or cannot be reached.
        ValueError: The model family is unknown, or both `device` and `device_map`, or `dtype` and
            `torch_dtype`, are given.
        TypeError: This is neither a name nor a path, or the model takes no such option.

    Example:
        model = ml.load("Qwen/Qwen2-VL-7B-Instruct", attn_implementation="eager")
    """
    import transformers
    from transformer_lens.model_bridge.sources.transformers.helpers import (
        get_hf_model_class_for_architecture,
    )

    if device is not None and device_map is not None:
        raise ValueError("Give device or device_map, not both: the map already says where.")
    if device_map is None and options.get("quantization_config") is not None:
        # Quantized layers are made where they are to be, as some cannot be moved.
        device_map = {"": device or default_device()}
    if "torch_dtype" in options:
        if dtype != "auto":
            raise ValueError("Give dtype or torch_dtype, not both: they are two names of one.")
        dtype = options.pop("torch_dtype")
    path = _resolve(name_or_path)
    shared = {name: options[name] for name in SHARED if name in options} | {"revision": revision}
    try:
        config = transformers.AutoConfig.from_pretrained(path, **shared)
    except OSError as error:
        if not Path(path).is_dir():
            error.add_note(f"There is no folder {path} either. {_known()}")
        raise
    architecture = (config.architectures or [type(config).__name__])[0]
    require_class(architecture)
    kind: Any = getattr(transformers, architecture, None)
    if has_adapter(architecture) or kind is None:
        kind = get_hf_model_class_for_architecture(architecture)
    model = kind.from_pretrained(
        path, **{"dtype": dtype, "device_map": device_map} | options | shared
    )
    if device_map is None:
        model.to(device or default_device())
    return wrap(model.eval(), _load_processor(path, shared), check)


def _resolve(name_or_path: str | Path) -> str:
    if not isinstance(name_or_path, str | os.PathLike):
        kind = name_or_path if isinstance(name_or_path, type) else type(name_or_path)
        raise TypeError(
            f"load takes a name or a path, not {kind.__name__}. {_known()} For a model that is "
            "loaded already, use ml.wrap(model, processor)."
        )
    name = str(name_or_path)
    if not name:
        raise FileNotFoundError(f"The name of the model is empty. {_known()}")
    if name in organisms.names() and not Path(name, "config.json").exists():
        return str(organisms.path(name))
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise FileNotFoundError(
                f"The folder {name} has no config.json, so it is no Hugging Face checkpoint. Name "
                "the folder that save_pretrained wrote to."
            )
        return str(folder)
    # A hub id is one word, or two with a slash between them.
    is_path = not isinstance(name_or_path, str) or name.startswith((".", "/", "~"))
    if is_path or name.endswith("/") or name.count("/") > 1:
        raise FileNotFoundError(f"There is no folder {name}. {_known()}")
    # Of one word are the hub's oldest models alone, none of which is called like ours.
    if near := difflib.get_close_matches(name.lower(), organisms.names(), n=1):
        raise FileNotFoundError(
            f"There is no model or folder {name!r}. Did you mean {near[0]!r}? {_known()}"
        )
    return name


def _known() -> str:
    names = ", ".join(map(repr, organisms.names())) or "none"
    return (
        "Name a checkpoint folder, a model on the Hugging Face hub (owner/name), or a model that "
        f"comes with this package ({names})."
    )


def _load_processor(path: str, options: dict[str, Any]) -> Any:
    """The checkpoint's processor, or None where the folder ships none."""
    import transformers

    files = ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json")
    if Path(path).is_dir() and not any(Path(path, file).exists() for file in files):
        return None
    processors: Any = transformers.AutoProcessor
    return processors.from_pretrained(path, **options)

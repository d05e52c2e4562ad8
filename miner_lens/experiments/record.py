"""What a folder of results is of, so that nothing else is put into it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from miner_lens import files, launchers
from miner_lens.data.signature import item_signature
from miner_lens.installed import versions
from miner_lens.models.access import identity

PROTOCOL = "protocol.json"


def keep_record(
    folder: Path, model: Any, data: Mapping[str, Any], settings: Mapping[str, Any]
) -> None:
    """Note in a folder what its results are of, or refuse one of something else.

    Versions of packages are noted, and may be others when it is gone on.

    Args:
        folder: The folder; made if needed.
        model: A `TransformerBridge`.
        data: Samples by name.
        settings: All else, as JSON can hold it.

    Raises:
        ValueError: The folder holds results of another model, of other data or other settings.
    """
    record: dict[str, Any] = {
        "model": identity(model).to_dict(),
        "data": {name: [len(some), item_signature(some[0])] for name, some in data.items()},
        "settings": dict(settings),
    }
    path, wanted = folder / PROTOCOL, json.loads(json.dumps(record))
    if path.is_file():
        there = json.loads(path.read_text())
        if differing := [name for name in wanted if there.get(name) != wanted[name]]:
            raise ValueError(
                f"{folder} holds the protocol of another {differing[0]}. Name another folder, or "
                "give what it was begun with."
            )
    elif launchers.rank() == 0:
        with files.whole(path) as temporary:
            text = json.dumps(wanted | {"versions": versions()}, indent=2)
            Path(temporary).write_text(text + "\n")

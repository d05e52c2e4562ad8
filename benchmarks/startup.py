"""What a user waits for before anything happens: the time of Python processes."""

from __future__ import annotations

import subprocess
import sys

from benchmarks.measure import Workload
from benchmarks.pair import Pair

HELP = "from miner_lens.cli import app; app(['--help'], prog_name='miner-lens')"


def catalogue() -> list[Pair]:
    """Import of the package, import of what mining needs, and the command's help."""
    return [
        _pair("import", "import miner_lens / torch", "import miner_lens", "import torch"),
        _pair(
            "mine",
            "import miner_lens, look up mine / import torch",
            "import miner_lens; miner_lens.mine",
            "import torch",
        ),
        _pair("help", "miner-lens --help / python -c pass", HELP, "pass"),
    ]


def _pair(name: str, measures: str, top: str, bottom: str) -> Pair:
    return Pair(f"startup-{name}", measures, lambda device: (_python(top), _python(bottom)))


def _python(code: str) -> Workload:
    command = [sys.executable, "-c", code]
    return lambda: subprocess.run(command, check=True, stdout=subprocess.DEVNULL)

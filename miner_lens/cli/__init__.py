"""What can be done without writing Python? The `miner-lens` command, a thin layer over the API.

Nothing heavy is imported before a command runs, so that `--help` answers at once.
"""

from miner_lens.cli import basics, experiments, inside, measures, reproduce
from miner_lens.cli.common import app

__all__ = ["app", "basics", "experiments", "inside", "measures", "reproduce"]

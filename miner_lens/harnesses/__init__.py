"""What do benchmarks say of an ablated model? Model classes for evaluation harnesses.

Each file needs its harness installed, and is imported by who uses it. With `value="zero"` a harness
can as well be given the checkpoint that `ml.bake` writes, and needs nothing of this.
"""

from miner_lens.harnesses.ablated import ablated

__all__ = ["ablated"]

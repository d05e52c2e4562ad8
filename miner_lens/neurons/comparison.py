"""Sets of neurons side by side: where they lie, and what they share."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations
from typing import TYPE_CHECKING

from miner_lens.neurons.neuron_set import NeuronSet

if TYPE_CHECKING:
    import pandas as pd


def distribution(*selections: Mapping[str, NeuronSet]) -> pd.DataFrame:
    """Where neurons lie: how many of each set are in each layer of each site.

    Args:
        selections: What `select` returns, one for each site.

    Returns:
        A table of the columns site, name, layer, count and share, the part of the layer's neurons;
        one row for each set and layer.

    Example:
        >>> chosen = {"code": NeuronSet([(1, 0), (1, 3)], layers=2, neurons=4)}
        >>> distribution(chosen)["count"].tolist()
        [0, 2]
    """
    import pandas as pd

    rows = [
        (neurons.site, name, layer, count, count / neurons.neurons)
        for selection in selections
        for name, neurons in selection.items()
        for layer, count in enumerate(neurons.counts())
    ]
    return pd.DataFrame(rows, columns=["site", "name", "layer", "count", "share"])


def overlap(*selections: Mapping[str, NeuronSet]) -> pd.DataFrame:
    """What sets of a site share, two at a time.

    Args:
        selections: What `select` returns, one for each site.

    Returns:
        A table of the columns site, name, other, shared (neurons in both), expected (by chance, of
        two random sets of these sizes, which is their hypergeometric mean) and jaccard (shared of
        those in either; 0 where both are empty); one row for each pair.

    Example:
        >>> one, two = (NeuronSet(p, layers=1, neurons=4) for p in ([(0, 0), (0, 1)], [(0, 1)]))
        >>> overlap({"code": one, "prose": two})[["shared", "expected", "jaccard"]].values.tolist()
        [[1.0, 0.5, 0.5]]
    """
    import pandas as pd

    rows = []
    for selection in selections:
        for (name, one), (other, two) in combinations(selection.items(), 2):
            shared, either = len(one & two), len(one | two)
            expected = len(one) * len(two) / (one.layers * one.neurons)
            rows.append(
                (one.site, name, other, shared, expected, shared / either if either else 0.0)
            )
    columns = ["site", "name", "other", "shared", "expected", "jaccard"]
    return pd.DataFrame(rows, columns=columns)

"""MMNeuron's counts as an analyzer: how often each neuron is active in each domain."""

from __future__ import annotations

from typing import Any

import torch
from einops import einsum
from torch import Tensor

from miner_lens.models.points import Point, activation_points
from miner_lens.running.analyzer import Analyzer
from miner_lens.running.batch import Batch
from miner_lens.scoring.domain_counts import DomainCounts

MOST = 2**24  # tokens that are counted at once


class DomainAnalyzer(Analyzer[DomainCounts]):
    """Counts, for each domain, the tokens and the positive activations of every neuron of a site.

    Domains are the samples' labels: `ml.run(model, {"code": a, "prose": b}, ml.DomainAnalyzer())`
    labels them by name. All real tokens of the prompt count (in a tower, all rows). For several
    sites in one pass, give `run` one analyzer each. What is specific to a domain `select` of the
    result says (LAPE as used by MMNeuron, Huo et al. 2024, arXiv 2406.11193).

    Args:
        site: Where the neurons live: `"llm"`, or a tower of the model.

    Example:
        counts = ml.run(model, {"code": code, "prose": prose}, ml.DomainAnalyzer())
        neurons = counts.select(top_rate=0.01)["code"]
    """

    def points(self, model: Any) -> list[Point]:
        """X of every layer."""
        return activation_points(model, self.site)

    def see(self, x: Tensor, point: Point, batch: Batch) -> None:
        """Count a layer's positive activations.

        Raises:
            ValueError: A sample has no label.
        """
        if None in batch.labels or not batch.labels:
            raise ValueError(
                "DomainAnalyzer counts by label, and a sample has none. Give data sets by name, "
                "ml.run(model, {'code': a, 'prose': b}, ...), or samples with label=."
            )
        domains = sorted({str(label) for label in batch.labels})
        mine = torch.tensor([[label == one for one in domains] for label in batch.labels])
        real = batch.real.to(x.device)
        chosen = mine.to(x.device)[..., None] & real[:, None]
        # Whole numbers are exact in float32 up to 2 ** 24.
        step = max(1, MOST // len(x))
        counts = torch.stack(
            [
                einsum(
                    some.float(),
                    (part > 0).float(),
                    "sample domain pos, sample pos neuron -> domain neuron",
                ).long()
                for some, part in zip(
                    torch.split(chosen, step, 2), torch.split(x, step, 1), strict=True
                )
            ]
        ).sum(0)
        tokens = chosen.sum((0, 2))
        for place, domain in enumerate(domains):
            self.sum(f"{domain}/over_zero", self.widened(counts[place]), at=point.layer)
            if point.layer == 0:
                self.sum(f"{domain}/tokens", tokens[place])

    def result(self) -> DomainCounts:
        """Counts by domain, in alphabetical order.

        Domains that never reach the site, as sentences never reach a vision tower, have 0 tokens.
        """
        if self.samples == 0 or self.identity is None:
            raise ValueError("No sample has been seen, so there are no counts.")
        none = torch.zeros(self.identity.layers, self.identity.neurons, dtype=torch.long)
        over_zero, tokens = [], []
        for domain in self.labels:
            seen = f"{domain}/tokens" in self
            over_zero.append(self[f"{domain}/over_zero"].cpu() if seen else none)
            tokens.append(int(self[f"{domain}/tokens"]) if seen else 0)
        return DomainCounts(
            torch.stack(over_zero, -1), torch.tensor(tokens), self.labels, identity=self.identity
        )

"""When an answer counts as right."""

from __future__ import annotations

from miner_lens.data.sample import Sample


def is_right(sample: Sample, answer: str) -> bool:
    """Whether an answer is one of the sample's accepted ones."""
    if not sample.answers:
        raise ValueError(f"{sample.id or 'A sample'} has no answers to compare with.")
    return answer.strip().lower() in {accepted.strip().lower() for accepted in sample.answers}

"""When an answer counts as right."""

from __future__ import annotations

from miner_lens.data.sample import Sample


def is_right(sample: Sample, answer: str) -> bool:
    """Whether an answer is one of the sample's accepted ones.

    Raises:
        ValueError: The sample has no accepted answer.
    """
    require_answers(sample)
    return answer.strip().lower() in {accepted.strip().lower() for accepted in sample.answers}


def require_answers(sample: Sample) -> None:
    """Refuse a sample that nobody can check.

    Raises:
        ValueError: The sample has no accepted answer.
    """
    if not sample.answers:
        raise ValueError(
            f"{sample.id or 'A sample'} has no answers to compare with. Give them as "
            "ml.Sample(messages, answers), or say which column holds them: "
            "ml.datasets.from_rows(rows, answers=...)."
        )

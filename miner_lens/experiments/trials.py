"""Trials: one sample under one condition. Every experiment is read from a table of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import torch

from miner_lens.data.labelled import labelled
from miner_lens.data.sample import Sample
from miner_lens.experiments.asking import Asking, Metric, PreparedCondition, Reading
from miner_lens.experiments.condition import Condition
from miner_lens.experiments.table import Trials
from miner_lens.models.access import identity
from miner_lens.models.bridge import prepared_bridge
from miner_lens.models.foreign import identified
from miner_lens.models.forward import evaluating
from miner_lens.models.generation import input_device
from miner_lens.models.inside import hf_model_of
from miner_lens.running.distributed import joined
from miner_lens.running.passes import Sampler
from miner_lens.running.work import Items, work_through

# So many samples are held prepared, media and all, and sorted by their length.
WINDOW = 32
# What is kept of a sample, so that a checkpoint of an older table is not continued.
TABLE = 2

# A sample, or a mapping that `Sample.of` takes.
Item = Sample | Mapping[str, Any]


def trials(
    model: Any,
    data: Iterable[Item] | Mapping[str, Iterable[Item]],
    conditions: Iterable[Condition],
    batch_size: int = 16,
    progress: bool = True,
    *,
    metric: Metric | Reading = "exact",
    max_new_tokens: int = 16,
    conditions_per_batch: int = 1,
    checkpoint: str | Path | None = None,
    checkpoint_every: float = 60.0,
) -> Trials:
    """Score each sample's answer under each condition; without generating, unless by a metric.

    The answer is read by the model after the prompt, in one pass for each condition and batch. Its
    log-probability is the sum over its tokens, without the end of the turn. It is correct if greedy
    decoding would give it and then end the turn, case and surrounding space aside, as `exact_match`
    has it: each of its tokens is the most probable after the prompt and those before it, or, where
    the model may say it in other tokens ("Red" for "red"), what it generates is the answer. With
    `metric="begins"` the end is not asked for: a model that gives the answer and then goes on is
    right. Of several accepted answers the first is asked for.
    With a function as metric, the model answers as well, which takes longer; `correct` is then what
    the function says of that answer, and the table has it as `answer`. Nothing is generated where
    greedy decoding is known to give the answer that was read.

    Samples are prepared once for all conditions, and those of like length go into a pass together.
    Towers run once for all conditions that switch off neurons of the decoder alone. With
    `value="min"` the minimum is over prompt and answer, where generation takes one for the prompt
    and one for each token. Under torchrun, accelerate or srun each process takes a share of
    the samples, and all get the table; see docs/scaling.md.

    Args:
        model: A `TransformerBridge` with a processor.
        data: Samples with answers, each with its own id if it has one, or a mapping of names to
            samples, which are then labelled by those names.
        conditions: What to switch off, each with its own name.
        batch_size: Samples in one forward pass.
        progress: Whether to show a progress bar.
        metric: `"exact"`, `"begins"`, or a function of a `Sample` and the model's answer that says
            from 0 to 1 how right it is.
        max_new_tokens: The length of an answer at most, where one is generated.
        conditions_per_batch: So many conditions go through the model together, as rows of one
            batch: it has `batch_size` rows for each. Values are the same but for rounding. It pays
            where a pass does not keep the device busy, or where few answers of each condition are
            generated. Conditions on neurons of a tower are tried one by one all the same, and so is
            all that generates by more than the most probable token (beams, a penalty).
        checkpoint: A folder in which to keep what is done, as for `ml.run`. Called again with the
            same model, data and arguments, a table that was stopped, also by SIGKILL, continues to
            the same table, bit for bit; with another number of processes too.
        checkpoint_every: Seconds between two writes.

    Raises:
        ValueError: No data, no condition, two conditions of one name, two samples of one id, a
            sample without answers or with an empty one, a condition that does not fit the model, a
            model without a processor or an end of turn, a batch size or number of conditions below
            1, an MLP that does not keep the rows of a batch apart where conditions share one, an
            unknown metric or one that gives something else than 0 to 1, a checkpoint of another
            table or one that is in use, or processes that differ in model, data or arguments.
        SampleError: A sample cannot be read.
        RankError: Another process has stopped.

    Example:
        conditions = [ml.Condition("intact"), ml.Condition("image", msns["image"])]
        table = ml.trials(model, data, conditions).to_frame()
        table.groupby("condition")["logprob"].mean()
    """
    model = prepared_bridge(model)
    checked = _checked(model, conditions)
    if not callable(metric) and metric not in get_args(Reading):
        raise ValueError(f"metric is 'exact', 'begins' or a function, not {metric!r}.")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, not {batch_size!r}.")
    if conditions_per_batch < 1:
        raise ValueError(f"conditions_per_batch must be at least 1, not {conditions_per_batch!r}.")
    asking = Asking(
        model, checked, batch_size, _ends(model), metric, max_new_tokens, conditions_per_batch
    )
    items = Items(labelled(data) if isinstance(data, Mapping) else data, None)
    settings = {
        "analyzers": [["trials", TABLE]],
        "conditions": [[one.condition.name, one.done] for one in checked],
        "batch_size": batch_size,
        "metric": metric,
        "max_new_tokens": max_new_tokens if callable(metric) else None,
    }
    if callable(metric):
        settings["metric"] = identified(metric, "metric", checkpoint is not None)
    if conditions_per_batch > 1:
        settings["conditions_per_batch"] = conditions_per_batch
    with evaluating(model), torch.no_grad(), joined() as ranks:
        sampler = Sampler(max(WINDOW, batch_size), input_device(model))
        seen, _ = work_through(
            ranks,
            model,
            items,
            [asking.scored],
            sampler,
            prepare=asking.prepare,
            work=asking.run,
            settings=settings,
            checkpoint=checkpoint,
            seconds=checkpoint_every,
            progress=progress,
        )
    if not seen:
        raise ValueError("There is no data: the iterable of samples is empty.")
    asking.require_own_ids()  # of all processes now
    names = [one.condition.name for one in checked]
    return asking.scored.table(names, not callable(metric), identity(model))


def _checked(model: Any, conditions: Iterable[Condition]) -> list[PreparedCondition]:
    """The conditions, each of which can be applied, and what each does."""
    conditions = list(conditions)
    if not conditions:
        raise ValueError("trials needs at least one condition, such as ml.Condition('intact').")
    if twice := _twice([condition.name for condition in conditions]):
        raise ValueError(f"Two conditions are called {twice!r}; give each a name of its own.")
    # All of them now, not after hours.
    return [PreparedCondition(one, one.prepared(model)) for one in conditions]


def _twice(names: Sequence[str]) -> str | None:
    """A name that occurs more than once."""
    return next((name for name, times in Counter(names).items() if times > 1), None)


def _ends(model: Any) -> list[int]:
    """The tokens at which generation stops."""
    config = getattr(hf_model_of(model), "generation_config", None)
    ends = getattr(config, "eos_token_id", None)
    if ends is None:
        raise ValueError(
            "The model has no token that ends its turn, so no answer is whole. Set "
            "model.original_model.generation_config.eos_token_id."
        )
    return [ends] if isinstance(ends, int) else list(ends)

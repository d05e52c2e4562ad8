"""`batch_size="auto"`: what goes through the model together, and what happens without memory."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

import miner_lens as ml
from miner_lens.models import access as models
from miner_lens.models import generation
from miner_lens.models.collate import collate
from miner_lens.models.structure import plain
from miner_lens.running import passes
from miner_lens.running.work import ahead
from tests.families import TEXT, build
from tests.models.test_audio import ask, clip, folder, hears  # noqa: F401 (fixtures)
from tests.models.test_messages import tokenizer
from tests.running.test_run import close, image_of, mine, sample


@pytest.fixture(scope="module")
def mixed() -> list[ml.Sample]:
    """Of many lengths and kinds."""
    frames = [image_of(colour)["image"] for colour in ("red", "blue", "green", "gray")]
    samples = [
        sample("picture", image_of("blue")),
        sample("words"),
        sample("pictures", image_of("red"), image_of("green")),
        sample("clip", {"type": "video", "video": frames}),
    ]
    longer = [sample(f"long {n}", {"type": "text", "text": "and " * n * 7}) for n in (5, 1, 4, 2)]
    large = [sample(f"large {n}", image_of("red", 28 * n)) for n in (4, 2, 5, 3)]
    return [*samples, *longer, *large] * 3


@pytest.fixture(scope="module")
def expected(shapes: Any, mixed: list[ml.Sample]) -> ml.ImportanceScores:
    """Of one sample after the other."""
    scores: ml.ImportanceScores = mine(shapes, mixed)
    return scores


class Sizes:
    """Notes the shape of each pass, and lets memory run out above some size."""

    def __init__(self, model: Any, most: float = float("inf"), error: Any = None) -> None:
        self.shapes: list[tuple[int, int]] = []
        self.failed = 0
        self.most = most
        self.error = error or torch.OutOfMemoryError("CUDA out of memory. Tried to allocate a lot")
        self.layer = plain(model.original_model.get_decoder().layers[3])
        self.forward = self.layer.forward

    def see(self, *args: Any, **kwargs: Any) -> Any:
        rows, tokens = (args[0] if args else kwargs["hidden_states"]).shape[:2]
        if rows * tokens > self.most:
            self.failed += 1
            raise self.error
        self.shapes.append((rows, tokens))
        return self.forward(*args, **kwargs)

    def __enter__(self) -> Sizes:
        # No hook, as a checkpoint refuses hooks that it cannot tell from others.
        self.layer.forward = self.see
        return self

    def __exit__(self, *exception: object) -> None:
        del self.layer.forward


def test_batches_by_length(shapes: Any, mixed: list[ml.Sample]) -> None:
    with Sizes(shapes) as alone:
        one = mine(shapes, mixed)
    with Sizes(shapes) as together:
        close(mine(shapes, mixed, batch_size="auto"), one, atol=1e-6)
    tokens = sum(rows * length for rows, length in alone.shapes)
    padded = sum(rows * length for rows, length in together.shapes)
    assert len(together.shapes) < len(alone.shapes) / 2
    assert padded < 1.2 * tokens
    pairs = []
    for item in mixed[:4]:
        inputs = ml.inputs(shapes, item.messages)
        pairs.append((inputs, models.layout(shapes).masks(inputs["input"])))
    close(mine(shapes, pairs, batch_size="auto"), mine(shapes, mixed[:4]), atol=1e-6)


def test_what_is_put_together_is_what_the_processor_makes(
    shapes: Any, mixed: list[ml.Sample]
) -> None:
    apart = [generation.render(shapes, [item.messages]) for item in mixed]
    made = collate(apart, shapes.processor.tokenizer.pad_token_id)
    expected = generation.render(shapes, [item.messages for item in mixed])
    assert made.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(made[name], value), name


def test_what_does_not_fit_together_stays_apart(shapes: Any, mixed: list[ml.Sample]) -> None:
    """Such as images of different sizes, in families that do not lay patches end to end."""
    sampler = passes.Sampler(4, torch.device("cpu"))
    ids = torch.zeros(1, 5, dtype=torch.long)

    def item(**inputs: torch.Tensor) -> passes.Item:
        return passes.Item(0, None, {"input_ids": ids, **inputs})

    small, large = (item(pixel_values=torch.zeros(1, 3, n, n)) for n in (8, 16))
    words, typed = item(), item(token_type_ids=ids)
    failed = passes.Item(0, None, None, ml.SampleError("unreadable"))
    for pending, together in (
        ([small, small, words, small], 4),
        ([words, small, large], 2),
        ([words, words, typed], 2),
        ([words, failed, words], 1),
        ([failed, words], 1),
    ):
        assert sampler.take(pending) == pending[:together]


def test_sounds_are_put_together_alike(hears: Any) -> None:  # noqa: F811
    conversations = [ask(clip(1)), ask(clip(0.3), clip(1.7, 200)), ask(clip(2, 300))]
    apart = [generation.render(hears, [messages]) for messages in conversations]
    made = collate(apart, hears.processor.tokenizer.pad_token_id)
    expected = generation.render(hears, conversations)
    assert made.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(made[name], value), name


def test_auto_skips_alike(shapes: Any, mixed: list[ml.Sample], expected: Any) -> None:
    broken = sample("broken", {"type": "image", "image": "no/such/file.png"})
    data = [mixed[0], broken, *mixed[1:]]
    with pytest.raises(ml.SampleError, match=r"broken: .*no/such/file.png"):
        mine(shapes, data, batch_size="auto")
    scores = mine(shapes, data, batch_size="auto", on_error="skip")
    assert scores.skipped == 1
    close(scores, expected, atol=1e-6)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory."),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory"
        ),
        MemoryError(),
    ],
)
def test_auto_backs_off_when_memory_runs_out(
    shapes: Any, mixed: list[ml.Sample], expected: Any, error: Exception
) -> None:
    with Sizes(shapes, most=200, error=error) as seen:
        scores = mine(shapes, mixed, batch_size="auto")
    close(scores, expected, atol=1e-6)
    assert 0 < seen.failed < 5
    assert max(rows for rows, _ in seen.shapes) > 1


def test_memory_that_is_too_small_for_one_sample(shapes: Any, mixed: list[ml.Sample]) -> None:
    for batch_size in (1, "auto"):
        with (
            Sizes(shapes, most=20),
            pytest.raises(torch.OutOfMemoryError) as caught,
        ):
            mine(shapes, mixed, batch_size=batch_size)
        assert "Memory ran out in a pass over" in caught.value.__notes__[0]
    with Sizes(shapes, error=RuntimeError("another error"), most=20), pytest.raises(RuntimeError):
        mine(shapes, mixed, batch_size="auto")


def test_auto_continues_bit_for_bit(shapes: Any, mixed: list[ml.Sample], tmp_path: Path) -> None:
    options = {"batch_size": "auto", "checkpoint": tmp_path, "checkpoint_every": 0}
    with Sizes(shapes, most=200) as whole_sizes:
        whole = mine(shapes, mixed, batch_size="auto")
    ran = len(whole_sizes.shapes) + whole_sizes.failed
    with Sizes(shapes, most=200) as sizes:
        for after in (
            3,
            ran - 1,
        ):  # in the first unit, before anything is written; in the second
            with stopping(shapes.original_model, after), pytest.raises(InterruptedError):
                mine(shapes, mixed, **options)
    with Sizes(shapes, most=200) as rest:
        resumed = mine(shapes, mixed, **options)
    assert sizes.failed > whole_sizes.failed > 0
    # The limit that was found is kept, so nothing fails once more.
    assert rest.failed == 0
    assert sum(rows for rows, _ in rest.shapes) == len(mixed) - passes.WINDOW
    assert rest.shapes == whole_sizes.shapes[-len(rest.shapes) :]
    assert torch.equal(resumed.values, whole.values)
    assert torch.equal(resumed.means, whole.means)


@contextmanager
def stopping(hf_model: Any, after: int) -> Iterator[None]:
    """A model that is interrupted after so many passes."""
    forward, left = hf_model.forward, iter(range(after))

    @wraps(forward)
    def stop(*args: Any, **kwargs: Any) -> Any:
        if next(left, None) is None:
            raise InterruptedError
        return forward(*args, **kwargs)

    hf_model.forward = stop
    try:
        yield
    finally:
        del hf_model.forward


@given(total=st.integers(0, 6), unprepared=st.none() | st.integers(0, 5))
def test_ahead_gives_all_before_the_first_that_cannot_be_prepared(
    total: int, unprepared: int | None
) -> None:
    def prepare(number: int) -> int:
        if number == unprepared:
            raise LookupError(f"preparing {number}")
        return 10 * number

    def result(pairs: Any) -> tuple[list[Any], str | None]:
        got = []
        try:
            for pair in pairs:
                got.append(pair)
        except LookupError as error:
            return got, str(error)
        return got, None

    one_by_one = ((number, prepare(number)) for number in range(total))
    assert result(ahead(range(total), prepare)) == result(one_by_one)


def test_ahead_takes_one_item_ahead_and_no_more() -> None:
    taken: list[int] = []
    pairs = ahead((taken.append(n) or n for n in range(5)), str)
    for number, (item, made) in enumerate(pairs):
        assert (item, made) == (number, str(number))
        assert taken == list(range(min(number + 2, 5)))


def test_samples_are_prepared_while_the_model_is_busy(
    shapes: Any, mixed: list[ml.Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, render, data = [threading.Event() for _ in range(7)], passes.render, mixed[:6]
    threads, busied = set(), []

    def noting(model: Any, conversations: Any, *prompt: Any) -> Any:
        threads.add(threading.current_thread())
        place = next(n for n, one in enumerate(data) if one.messages is conversations[0])
        asked[place].set()
        return render(model, conversations, *prompt)

    def busy(*_: Any) -> None:
        busied.append(len(busied))
        assert len(busied) == len(data) or asked[len(busied)].wait(30)

    monkeypatch.setattr(passes, "render", noting)
    handle = shapes.original_model.register_forward_pre_hook(busy)
    try:
        mine(shapes, data)
    finally:
        handle.remove()
    assert len(busied) == len(data)
    assert threading.main_thread() not in threads
    assert not any(thread.is_alive() for thread in threads)


def test_a_processor_that_makes_no_mask(shapes: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    samples = [
        sample("words"),
        sample("picture", image_of("blue")),
        sample("more", {"type": "text", "text": "and " * 9}),
    ]
    expected = mine(shapes, samples)
    answers = [ml.generate(shapes, one.messages, 4) for one in samples]
    monkeypatch.setattr(shapes.processor.tokenizer, "model_input_names", ["input_ids"])
    assert "attention_mask" not in shapes.processor.tokenizer("hello")
    for batch_size in (1, 3, "auto"):
        close(mine(shapes, samples, batch_size=batch_size), expected)
    assert ml.generate(shapes, [list(one.messages) for one in samples], 4) == answers


def test_a_tokenizer_that_makes_no_mask(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = build("Qwen2ForCausalLM", **TEXT)
    words = tokenizer()
    words.chat_template = "{% for m in messages %}<s>{{ m.content }}</s>{% endfor %}"
    words.save_pretrained(tmp_path)
    words = AutoTokenizer.from_pretrained(tmp_path, model_input_names=["input_ids"])
    talks = [
        [{"role": "user", "content": content}]
        for content in ("is it red ?", "hello there how are you today my friend ?")
    ]
    tokens = [words.apply_chat_template(t, return_tensors="pt", return_dict=True) for t in talks]
    assert all("attention_mask" not in one for one in tokens)
    greedy = {"do_sample": False, "max_new_tokens": 4}
    plain = [model.generate(one["input_ids"], **greedy)[0] for one in tokens]
    ends = [
        words.decode(row[one["input_ids"].shape[1] :], skip_special_tokens=True)
        for row, one in zip(plain, tokens, strict=True)
    ]
    bridge = ml.wrap(model, words)
    samples = [ml.Sample(one) for one in talks]
    one, two = (ml.mine(bridge, samples, batch_size=n, progress=False) for n in (1, 2))
    close(two, one)
    assert ml.generate(bridge, talks, 4) == ends
    assert bool(ml.inputs(bridge, talks[0])["attention_mask"].all())

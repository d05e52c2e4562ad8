from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from miner_lens.models.modality import parts_of
from miner_lens.scoring import kernels
from tests.reference import load

few = settings(max_examples=20, deadline=None)
shapes = st.tuples(
    st.integers(0, 2**31),  # seed
    st.integers(2, 20),  # pos
    st.integers(2, 12),  # neuron
    st.integers(1, 4),  # modality
)


def layer(seed: int, pos: int, neurons: int, modalities: int, heads: int = 2) -> tuple[Tensor, ...]:
    """Random x, q, k and overlapping masks of one sample."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(1, pos, neurons, generator=generator)
    q, k = torch.randn(2, 1, heads, pos, 8, generator=generator)
    masks = torch.rand(1, modalities, pos, generator=generator) < 0.4
    return x, q, k, masks


def twin(x: Tensor, attention: Tensor, masks: Tensor) -> Tensor:
    """The definition, word for word and in fp64: [metric modality neuron] of one sample."""
    scores = torch.zeros(5, len(masks), x.shape[1], dtype=torch.float64)
    for m, mask in enumerate(masks):
        if not mask.any():
            continue
        s, a = x[mask].double(), attention[mask][:, mask].double()
        raw = [(s > 0).double().mean(0), s.mean(0), s.amax(0)]
        raw += [(a.softmax(0).T @ s).sum(0), (a.softmax(1) @ s).sum(0)]
        for i, row in enumerate(raw):
            if row.max() > row.min():
                scores[i, m] = (row - row.min()) / (row.max() - row.min())
    return scores


def normalised(row: Tensor) -> Tensor:
    """Min-max over neurons by the definition, 0 where all are equal."""
    if row.max() == row.min():
        return torch.zeros_like(row)
    return (row - row.min()) / (row.max() - row.min())


@pytest.mark.parametrize("name", ["image", "video", "text", "audio"])
def test_reference(name: str) -> None:
    data = load(f"scores_{name}.npz")
    q, k, x = (torch.tensor(data[key])[None] for key in ("q", "k", "act"))
    masks = torch.stack([torch.tensor(data[f"mask_{m}"]) for m in data["modalities"]])[None]
    attention = kernels.head_mean_attention(q, k)
    torch.testing.assert_close(attention[0], torch.tensor(data["attn"]), atol=1e-6, rtol=0)
    assert list(data["metrics"]) == list(kernels.METRICS)
    scores = kernels.importance(x, attention, masks)
    torch.testing.assert_close(scores[0], torch.tensor(data["ism"]), atol=1e-5, rtol=0)


@few
@given(shapes, st.booleans())
def test_collapsed_sums_equal_the_definition(shape: tuple[int, ...], causal: bool) -> None:
    x, q, k, masks = layer(*shape)
    attention = kernels.head_mean_attention(q, k, causal)
    weights = kernels.attention_sums(attention, masks)
    for m, mask in enumerate(masks[0]):
        a, s = attention[0][mask][:, mask].double(), x[0, mask].double()
        expected = torch.stack([(a.softmax(0).T @ s).sum(0), (a.softmax(1) @ s).sum(0)])
        collapsed = weights[0, :, m].double() @ x[0].double()
        torch.testing.assert_close(collapsed, expected, atol=1e-5, rtol=0)
        assert not weights[0, :, m, ~mask].any()


@few
@given(shapes)
def test_importance_is_the_definition(shape: tuple[int, ...]) -> None:
    x, q, k, masks = layer(*shape)
    attention = kernels.head_mean_attention(q, k)
    sums = kernels.attention_sums(attention, masks)
    raw = kernels.statistics(x, sums, masks)
    expected = twin(x[0], attention[0], masks[0])
    # Where neurons differ by little, min-max magnifies the rounding of the raw sums.
    spread = (raw.amax(-1) - raw.amin(-1)).clamp(min=1e-3)[0, ..., None]
    scores = kernels.importance(x, attention, masks)
    assert ((scores[0] - expected).abs() * spread.clamp(max=1)).max() < 1e-5


@few
@given(shapes)
def test_permuting_neurons_permutes_scores(shape: tuple[int, ...]) -> None:
    x, q, k, masks = layer(*shape)
    attention = kernels.head_mean_attention(q, k)
    order = torch.randperm(x.shape[-1], generator=torch.Generator().manual_seed(shape[0]))
    sums = kernels.attention_sums(attention, masks)
    permuted = kernels.statistics(x[..., order], sums, masks)
    torch.testing.assert_close(permuted, kernels.statistics(x, sums, masks)[..., order])


@few
@given(shapes, st.integers(1, 5), st.booleans(), st.booleans())
def test_padding_and_batching_change_nothing(
    shape: tuple[int, ...], padding: int, left: bool, causal: bool
) -> None:
    x, q, k, masks = layer(*shape)
    pos = x.shape[1]

    def raw(x: Tensor, q: Tensor, k: Tensor, masks: Tensor, real: Tensor | None) -> Tensor:
        attention = kernels.head_mean_attention(q, k, causal, real)
        assert attention.isfinite().all()
        return kernels.statistics(x, kernels.attention_sums(attention, masks), masks)

    alone = raw(x, q, k, masks, None)
    here = slice(padding, None) if left else slice(pos)
    x2, q2, k2 = (
        torch.full((2, *t.shape[1:-2], pos + padding, t.shape[-1]), 50.0) for t in (x, q, k)
    )
    masks2 = torch.zeros(2, masks.shape[1], pos + padding, dtype=torch.bool)
    real = torch.zeros(2, pos + padding, dtype=torch.bool)
    x2[0, here], q2[0, :, here], k2[0, :, here] = x[0], q[0], k[0]
    masks2[0, :, here], real[0, here] = masks[0], True
    x2[1], q2[1], k2[1] = torch.randn_like(x2[1]), torch.randn_like(q2[1]), torch.randn_like(k2[1])
    real[1] = masks2[1, 0] = True
    together = raw(x2, q2, k2, masks2, real)
    torch.testing.assert_close(together[0], alone[0], atol=1e-5, rtol=1e-5)
    attention = kernels.head_mean_attention(q2, k2, causal, real)
    assert not attention[0, ~real[0]].any()
    assert not attention[0, :, ~real[0]].any()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kv_heads", [1, 2, 6])
def test_attention_with_grouped_queries(causal: bool, kv_heads: int) -> None:
    q, k = torch.randn(2, 6, 33, 16), torch.randn(2, kv_heads, 33, 16)
    scores = q @ k.repeat_interleave(6 // kv_heads, 1).mT / 4
    if causal:
        scores = scores.masked_fill(torch.ones(33, 33, dtype=torch.bool).triu(1), -torch.inf)
    expected = scores.softmax(-1).mean(1)
    torch.testing.assert_close(kernels.head_mean_attention(q, k, causal), expected)


@few
@given(shapes, st.booleans(), st.booleans(), st.integers(1, 9), st.integers(0, 200))
def test_fused_sums_equal_those_of_the_pattern(
    shape: tuple[int, ...], causal: bool, padded: bool, rows: int, budget: int
) -> None:
    _, q, k, masks = layer(*shape, heads=4)
    k = k[:, ::2]
    real = masks.any(1) if padded else None
    pattern = kernels.head_mean_attention(q, k, causal, real)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "_KEPT_ON_CPU", budget)
        patch.setattr(
            kernels, "_chunks", lambda n, *_: [(a, min(a + rows, n)) for a in range(0, n, rows)]
        )
        fused = kernels.fused_attention_sums(q, k, masks, causal, real)
    torch.testing.assert_close(fused, kernels.attention_sums(pattern, masks), atol=1e-5, rtol=1e-5)


@few
@given(shapes, st.integers(1, 9), st.integers(0, 200), st.data())
def test_segments_attend_only_to_themselves(
    shape: tuple[int, ...], rows: int, budget: int, data: st.DataObject
) -> None:
    _, q, k, masks = layer(*shape)
    pos = q.shape[2]
    steps = data.draw(st.lists(st.integers(0, 2), min_size=pos, max_size=pos))
    segments = torch.tensor(steps).cumsum(0)
    scores = (q @ k.mT / q.shape[-1] ** 0.5).double()
    scores[:, :, segments[:, None] != segments] = -torch.inf
    pattern = scores.softmax(-1).mean(1).float()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "_KEPT_ON_CPU", budget)
        patch.setattr(
            kernels, "_chunks", lambda n, *_: [(a, min(a + rows, n)) for a in range(0, n, rows)]
        )
        fused = kernels.fused_attention_sums(q, k, masks, segments=kernels.Segments.of(segments))
    torch.testing.assert_close(fused, kernels.attention_sums(pattern, masks), atol=1e-5, rtol=1e-5)


@few
@given(shapes, st.booleans(), st.booleans(), st.integers(1, 9), st.data())
def test_received_attention_is_the_sum_of_columns(
    shape: tuple[int, ...], causal: bool, padded: bool, rows: int, data: st.DataObject
) -> None:
    x, q, k, masks = layer(*shape, heads=4)
    pos = q.shape[2]
    real = masks.any(1) if padded else torch.ones(1, pos, dtype=torch.bool)
    steps = data.draw(st.lists(st.integers(0, 1), min_size=pos, max_size=pos))
    stretch = torch.tensor(steps).cumsum(0)
    expected = torch.zeros(pos, dtype=torch.float64)
    for query in range(pos):
        if not real[0, query]:
            continue
        seen = real[0] & (stretch == stretch[query])
        if causal:
            seen = seen & (torch.arange(pos) <= query)
        for head in range(4):
            scores = k[0, head // 2 * 2, seen].double() @ q[0, head, query].double() / 8**0.5
            expected[seen] += scores.softmax(0) / 4
    segments = kernels.Segments.of(stretch)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            kernels, "_chunks", lambda n, *_: [(a, min(a + rows, n)) for a in range(0, n, rows)]
        )
        mask = real if padded else None
        received = kernels.received_attention(q, k[:, ::2], causal, mask, segments)
        weights = kernels.attended_weights(received, masks)
        raw = kernels.statistics(x, weights, masks)
    torch.testing.assert_close(received[0].double(), expected, atol=1e-5, rtol=1e-5)
    for m, mask in enumerate(masks[0]):
        own = mask & real[0]
        attended = torch.zeros(x.shape[2], dtype=torch.float64)
        if own.any():
            attended = expected[own] @ x[0, own].double() / expected[own].sum()
        torch.testing.assert_close(raw[0, 3, m].double(), attended, atol=1e-5, rtol=1e-5)


@few
@given(shapes, st.booleans(), st.integers(1, 9))
def test_largest_attention(shape: tuple[int, ...], causal: bool, rows: int) -> None:
    _, q, k, masks = layer(*shape)
    pattern = kernels.head_mean_attention(q, k, causal)[0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            kernels, "_chunks", lambda n, *_: [(a, min(a + rows, n)) for a in range(0, n, rows)]
        )
        found = kernels.largest_attention(q, k, masks, causal)[0]
    for m, mask in enumerate(masks[0]):
        own = pattern[mask][:, mask]
        torch.testing.assert_close(found[m], own.max() if own.numel() else torch.tensor(0.0))


@few
@given(shapes)
def test_statistics_without_weights_are_the_first_three(shape: tuple[int, ...]) -> None:
    x, q, k, masks = layer(*shape)
    raw = kernels.statistics(x, kernels.fused_attention_sums(q, k, masks), masks)
    none = torch.zeros(1, 0, *masks.shape[1:])
    torch.testing.assert_close(kernels.statistics(x, none, masks), raw[:, :3])


@few
@given(shapes, st.integers(1, 9))
def test_modalities_follow_from_their_parts(shape: tuple[int, ...], rows: int) -> None:
    x, q, k, masks = layer(*shape)
    base = torch.stack([masks[:, 0], ~masks[:, 0] & (q[:, 0, :, 0] > 0)], 1)
    both = torch.cat([base.any(1, keepdim=True), base], 1)
    sums = kernels.fused_attention_sums(q, k, both)
    expected = kernels.statistics(x, sums, both)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            kernels, "_chunks", lambda n, *_: [(a, min(a + rows, n)) for a in range(0, n, rows)]
        )
        derived = kernels.statistics(x, sums, both, [(1, 2), (1,), (2,)])
    torch.testing.assert_close(derived, expected, atol=1e-5, rtol=1e-5)


def test_parts_are_looked_up() -> None:
    text, special = torch.tensor([[True, False, False]]), torch.tensor([[False, True, False]])
    masks = {"special_text": text | special, "text": text, "special": special}
    assert parts_of(masks) == [(1, 2), (1,), (2,)]
    # Not with somebody's own masks, where the whole is more than the parts, or they overlap.
    assert parts_of(masks | {"special_text": ~text & ~special})[0] == (0,)
    assert parts_of(masks | {"special": text | special})[0] == (0,)
    assert parts_of({"prompt": text}) == [(0,)]


def test_chunks_join_up(monkeypatch: pytest.MonkeyPatch) -> None:
    x, q, k, masks = layer(3, 50, 12, 4)
    real = masks.any(1)

    def scores(causal: bool) -> Tensor:
        attention = kernels.head_mean_attention(q, k, causal, real)
        return kernels.statistics(x, kernels.attention_sums(attention, masks), masks)

    whole = [scores(False), scores(True)]
    monkeypatch.setattr(
        kernels, "_chunks", lambda pos, *_: [(a, min(a + 7, pos)) for a in range(0, pos, 7)]
    )
    for expected, causal in zip(whole, (False, True), strict=True):
        torch.testing.assert_close(scores(causal), expected, atol=1e-5, rtol=1e-5)


def test_half_precision_inputs() -> None:
    x, q, k, masks = layer(1, 30, 8, 3)
    q, k, x = q.bfloat16(), k.bfloat16(), x.bfloat16()
    attention = kernels.head_mean_attention(q, k)
    assert attention.dtype == torch.float32
    torch.testing.assert_close(attention, kernels.head_mean_attention(q.float(), k.float()))
    scores = kernels.importance(x, attention, masks)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, kernels.importance(x.float(), attention, masks))


def test_absent_modality_scores_zero_and_negative_maxima_count() -> None:
    x = -torch.rand(1, 6, 5) - 1
    masks = torch.tensor([[[True] * 6, [False] * 6]])
    attention = torch.full((1, 6, 6), 1 / 6)
    raw = kernels.statistics(x, kernels.attention_sums(attention, masks), masks)
    assert torch.equal(raw[0, 2, 0], x[0].amax(0))
    assert not raw[0, :, 1].any()
    scores = kernels.importance(x, attention, masks)
    assert scores.isfinite().all()
    assert not scores[0, :, 1].any()
    assert scores[0, 2, 0].max() == 1
    assert not scores[0, 0, 0].any()  # prob is 0 of all neurons: published code gives NaN


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("kind", ["x", "attention"])
def test_bad_activations_stay_visible(bad: float, kind: str) -> None:
    x, q, k, masks = layer(2, 10, 4, 1)
    attention = kernels.head_mean_attention(q, k)
    where = int(masks[0, 0].nonzero()[0])
    if kind == "x":
        x[0, where, 1] = bad
    else:
        attention[0, where, where] = bad if bad > 0 else torch.nan
    assert kernels.importance(x, attention, masks).isnan().any()


def test_inputs_that_require_gradients() -> None:
    x, q, k, masks = layer(4, 10, 4, 2)
    attention = kernels.head_mean_attention(q.requires_grad_(), k.requires_grad_())
    assert not kernels.importance(x.requires_grad_(), attention, masks).requires_grad


def test_key_heads_must_divide_query_heads() -> None:
    with pytest.raises(ValueError, match=r"q has 6 heads and k has 4.*Pass k as"):
        kernels.head_mean_attention(torch.randn(1, 6, 3, 2), torch.randn(1, 4, 3, 2))


@pytest.mark.parametrize("by_stretch", [True, False])
def test_maxima_as_a_cpu_and_as_a_gpu_computes_them(by_stretch: bool) -> None:
    x = torch.randn(3, 17, 5)
    masks = torch.rand(3, 4, 17) < 0.4
    masks[1, 2] = False
    found = kernels.maxima(x, masks, by_stretch)
    for row in range(3):
        for modality in range(4):
            inside = x[row, masks[row, modality]]
            wanted = inside.amax(0) if len(inside) else torch.full((5,), -torch.inf)
            assert torch.equal(found[row, modality], wanted)


def test_kernels_compute_in_fp32_under_autocast() -> None:
    x, q, k, masks = layer(seed=1, pos=30, neurons=12, modalities=3)

    def computed() -> list[Tensor]:
        sums = kernels.fused_attention_sums(q, k, masks=masks)
        attention = kernels.head_mean_attention(q, k)
        raw = kernels.statistics(x, sums, masks)
        received = kernels.received_attention(q, k)
        weights = kernels.attended_weights(received, masks)
        return [sums, attention, kernels.attention_sums(attention, masks), raw, received, weights]

    expected = computed()
    with torch.autocast("cpu", torch.bfloat16):
        assert all(map(torch.equal, computed(), expected))

"""On GPUs that are only pretended: their tensors have a device and a shape, and no numbers.

Whatever would wait for a device to give up a number raises there, and so does mixing devices. That
leaves copies between the host and a device, which wait as well, and are counted here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from torch.utils._python_dispatch import TorchDispatchMode

import miner_lens as ml
from miner_lens.analyzers.importance import ImportanceAnalyzer
from miner_lens.analyzers.passes import TowerPass
from miner_lens.models import access as models
from miner_lens.models import sites
from miner_lens.neurons import ablation
from miner_lens.running.batches import Batch
from miner_lens.scoring import kernels
from tests import towers

GPUS = ("cuda:0", "cuda:1")


class Copies(TorchDispatchMode):
    """Names what moves tensors between the host and a device."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        tensors = [t for t in (*args, result) if isinstance(t, Tensor)]
        if "copy" in func.name() and len({t.device.type for t in tensors}) > 1:
            self.seen.append(func.name())
        return result


@contextmanager
def pretending() -> Iterator[tuple[FakeTensorMode, Copies]]:
    with FakeTensorMode() as mode, Copies() as copies:
        yield mode, copies


def on_gpu(value: Any, mode: FakeTensorMode, device: str = GPUS[0]) -> Any:
    """A pretended copy of whatever holds tensors."""
    if isinstance(value, Tensor):
        return mode.from_tensor(value).to(device)
    if isinstance(value, list | tuple):
        return type(value)([on_gpu(one, mode, device) for one in value])
    if is_dataclass(value):
        parts = (on_gpu(getattr(value, field.name), mode, device) for field in fields(value))
        return type(value)(*parts)  # type: ignore[arg-type]
    return value


def case(site: str) -> tuple[Any, Batch]:
    """A model that has the site, and three padded prompts."""
    audio = site == "audio"
    model = ml.wrap(towers.audio_model() if audio else towers.vision_model())
    inputs = towers.audio_inputs() if audio else towers.vision_inputs()
    masks = models.layout(model).masks(inputs["input_ids"], inputs["attention_mask"])
    return model, Batch(inputs, masks, ("a", "b", "c"))


def record(model: Any, batch: Batch, names: list[str]) -> list[tuple[str, Tensor]]:
    """What passes through these hook points, in order."""
    seen: list[tuple[str, Tensor]] = []

    def keep(tensor: Tensor, hook: Any) -> None:
        seen.append((hook.name, tensor.clone()))

    with torch.no_grad(), model.hooks(fwd_hooks=[(name, keep) for name in names]):
        model.original_model(**batch.inputs)
    return seen


@pytest.mark.parametrize("devices", [GPUS[:1], GPUS], ids=["one", "two"])
@pytest.mark.parametrize("kept", [2**27, 0])
@pytest.mark.parametrize("site", ["llm", "llm causal", "vision", "projector", "audio"])
def test_no_layer_waits_for_a_device(
    site: str, kept: int, devices: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "_KEPT_ON_ACCELERATOR", kept)
    site, _, causal = site.partition(" ")
    model, batch = case(site)
    analyzer = ImportanceAnalyzer("causal" if causal else "bidirectional", site=site)
    hooks = dict(analyzer.hooks(model, batch))
    passing = record(model, batch, list(hooks))
    reading = analyzer._pass
    present = reading.present()
    monkeypatch.setattr(reading, "present", lambda: present)
    brought = []
    if isinstance(reading, TowerPass):
        cpu = torch.device("cpu")
        brought = [reading._bring(call, cpu) for call in range(len(reading.calls))]
    with pretending() as (mode, copies):
        if isinstance(reading, TowerPass):
            there = on_gpu(brought, mode)
            monkeypatch.setattr(reading, "_bring", lambda call, device: there[call])
        else:
            assert reading.padding is not None
            reading.masks, reading.padding = on_gpu([reading.masks, reading.padding], mode)
        given = []
        for name, tensor in passing:
            layer = int(next(iter(re.findall(r"\d+", name)), 0))
            given.append((name, on_gpu(tensor, mode, devices[layer % len(devices)])))
        copies.seen.clear()
        for name, tensor in given:
            hooks[name](tensor, None)
        assert not copies.seen
        with pytest.raises(DataDependentOutputException):
            analyzer.check(batch)  # here it looks at the numbers
        assert len(copies.seen) == 1
        analyzer.update(batch)
        assert len(copies.seen) == 1
    assert {scores.device.type for scores in analyzer._scores.values()} == {"cuda"}


@pytest.mark.parametrize(("pos", "megabytes"), [(1_246, 150), (8_192, 600)])
def test_memory_on_a_device(pos: int, megabytes: float) -> None:
    """At the layer shapes of Qwen2-VL-2B, in the chunks that a device gets."""
    with pretending(), torch.device(GPUS[0]):
        q, k = (torch.empty(1, heads, pos, 128, dtype=torch.bfloat16) for heads in (12, 2))
        x = torch.empty(1, pos, 8_960, dtype=torch.bfloat16)
        masks = torch.empty(1, 5, pos, dtype=torch.bool)
        sums = torch.empty(1, 2, 5, pos)
        for call in (
            lambda: kernels.fused_attention_sums(q, k, masks),
            lambda: kernels.statistics(x, sums, masks),
        ):
            with MemTracker() as tracker:
                call()
            peak = tracker.get_tracker_snapshot("peak")[q.device]["Total"]
            assert 10e6 < peak < megabytes * 1e6


@pytest.mark.parametrize("complement", [False, True])
@pytest.mark.parametrize("value", ["zero", "min", "mean", 0.5])
@pytest.mark.parametrize("site", ["llm", "llm image", "vision", "audio"])
def test_no_ablated_layer_waits_for_a_device(site: str, value: Any, complement: bool) -> None:
    site, _, at = site.partition(" ")
    model, batch = case(site)
    place = sites.find(model.original_model, site)
    mlps = place.mlps(model.original_model)
    mask = torch.zeros(len(mlps), mlps[0].before.out_features, dtype=torch.bool)
    mask[:, ::7] = True
    means = torch.randn(mask.shape)
    neurons = ml.NeuronSet.from_mask(mask, means=means, site=site)
    write = ablation._Write(neurons, value, at or None, complement)
    tokens = ablation._tokens(model, write)
    targets = write.targets(mlps)
    name = place.activation_point(0)
    x = record(model, batch, [name])[0][1]
    prompt, there = [batch.inputs["input_ids"], batch.real], None
    if isinstance(tokens, ablation._TowerRows):
        tokens._rows = place.calls(model.original_model, batch.inputs)[0].rows
        tokens.lowest(x)
        there = tokens._there
    with pretending() as (mode, copies):
        if isinstance(tokens, ablation._TowerRows):
            tokens._there = on_gpu(there, mode)
        else:
            tokens.ids, tokens.real = on_gpu(prompt, mode)
            tokens.chosen()  # once a pass, its token ids are looked up
        given = [(on_gpu(x, mode), on_gpu(target, mode)) for target in targets.values()]
        copies.seen.clear()
        for x, target in given:
            assert write(x, target, tokens).device == torch.device(GPUS[0])
        assert not copies.seen


def test_a_tower_looks_its_rows_up_once_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = case("vision")
    asked = []
    bring = TowerPass._bring

    def count(reading: TowerPass, call: int, device: torch.device) -> Any:
        asked.append(call)
        return bring(reading, call, device)

    monkeypatch.setattr(TowerPass, "_bring", count)
    ml.mine(model, [(batch.inputs, batch.masks)], site="vision", progress=False)
    assert asked == [0, 1]  # images and videos, through three blocks each

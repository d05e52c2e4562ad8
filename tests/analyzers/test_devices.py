"""On GPUs that are only pretended: their tensors have a device and a shape, and no numbers.

Whatever would wait for a device to give up a number raises there, and so does mixing devices. That
leaves copies between the host and a device, which wait as well, and are counted here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from dataclasses import fields, is_dataclass, replace
from threading import get_ident
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from torch.utils._python_dispatch import TorchDispatchMode

import miner_lens as ml
from miner_lens.analyzers import attention_sums
from miner_lens.analyzers.importance import ImportanceAnalyzer
from miner_lens.models import access as models
from miner_lens.models import sites
from miner_lens.models.forward_pass import Call, ForwardPass
from miner_lens.models.items import Items
from miner_lens.neurons import writing
from miner_lens.running.batch import Batch
from miner_lens.running.hooks import pass_hooks
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
    if isinstance(value, dict):
        return {key: on_gpu(one, mode, device) for key, one in value.items()}
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
    batch = Batch(inputs, masks, ("a", "b", "c"), index=(0, 1, 2))
    assert batch.padding is not None  # looked up once a pass, where there are numbers
    assert batch.parts
    return model, batch


def record(model: Any, batch: Batch, names: list[str]) -> list[tuple[str, Tensor]]:
    """What passes through these hook points, in order."""
    seen: list[tuple[str, Tensor]] = []

    def keep(tensor: Tensor, hook: Any) -> None:
        seen.append((hook.name, tensor.clone()))

    with torch.no_grad(), model.hooks(fwd_hooks=[(name, keep) for name in names]):
        model.original_model(**batch.inputs)
    return seen


class Spread(ml.Analyzer[None]):
    """Every kind of state."""

    def points(self, model: Any) -> list[ml.Point]:
        return ml.activation_points(model, self.site)

    def see(self, x: Tensor, point: ml.Point, batch: Batch) -> None:
        real = batch.real.to(x.device)[..., None]
        rows = (x * real).sum(1)
        self.sum("tokens", real.sum(), at=point.layer)
        self.max("max", rows.amax(0), at=point.layer)
        self.min("min", rows.amin(0), at=point.layer)
        self.top("top", rows, torch.arange(len(rows), device=x.device), 2, at=point.layer)
        self.keep(f"rows {point.layer}", rows, 2, ids=torch.arange(len(rows), device=x.device))

    def result(self) -> None:
        pass


def moved(batch: Batch, site: str, mode: FakeTensorMode, devices: tuple[str, ...]) -> Batch:
    """A batch on pretended devices, with what was looked up once a pass or once a call."""
    inputs, masks = on_gpu([batch.inputs, batch.masks], mode)
    there = Batch(inputs, masks, batch.ids, index=batch.index)
    vars(there).update(padding=on_gpu(batch.padding, mode), parts=batch.parts)
    for key, made in batch._made.items():
        if key == "towers" and site != "llm":
            tower = copy(made[site])
            tower.batch = there
            there.towers[site] = tower
        elif isinstance(key, tuple) and key[0] == "segments":
            for gpu in devices:
                there._made[*key[:-1], torch.device(gpu)] = on_gpu(made, mode, gpu)
        elif isinstance(key, tuple) and isinstance(key[0], tuple):
            there._made[key] = made  # what was read off a mask, once a pass
        elif isinstance(key, tuple) and key[0] == "view":
            for gpu in devices:
                view = replace(made, masks=on_gpu(made.masks, mode, gpu), whole=there)
                there._made[*key[:-1], torch.device(gpu)] = view
    return there


@pytest.mark.parametrize("devices", [GPUS[:1], GPUS], ids=["one", "two"])
@pytest.mark.parametrize("kept", [2**27, 0])
@pytest.mark.parametrize("site", ["llm", "llm causal", "vision", "projector", "audio"])
def test_no_layer_waits_for_a_device(
    site: str, kept: int, devices: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "_KEPT_ON_ACCELERATOR", kept)
    site, _, causal = site.partition(" ")
    model, batch = case(site)
    attention: Any = "causal" if causal else "bidirectional"
    metrics = kernels.ALL_METRICS
    analyzers = (ImportanceAnalyzer(attention, site=site, metrics=metrics), Spread(site))
    for analyzer in analyzers:
        analyzer.begin(model)
        analyzer.open(batch, model.original_model)
    running = [batch]
    hooks = pass_hooks(analyzers, model, lambda: running[0])
    calls: list[Any] = []
    call_of = attention_sums.call_of
    monkeypatch.setattr(
        attention_sums, "call_of", lambda one: calls.append(call_of(one)) or calls[-1]
    )
    with torch.no_grad(), model.hooks(fwd_hooks=hooks):
        model.original_model(**batch.inputs)
    monkeypatch.setattr(attention_sums, "call_of", lambda _: calls.pop(0))
    passing = record(model, batch, list(dict.fromkeys(name for name, _ in hooks)))
    with pretending() as (mode, copies):
        running[0] = moved(batch, site, mode, devices)
        for analyzer in analyzers:
            analyzer.open(running[0], model.original_model)
        given = []
        for name, tensor in passing:
            layer = int(next(iter(re.findall(r"\d+", name)), 0))
            given.append((name, on_gpu(tensor, mode, devices[layer % len(devices)])))
        copies.seen.clear()
        for name, tensor in given:
            for hooked, function in hooks:
                if hooked == name:
                    function(tensor, None)
        for analyzer in analyzers:
            with pytest.raises(DataDependentOutputException):
                analyzer.check(running[0])  # here it looks at the numbers
            analyzer.accept(running[0])
        assert not copies.seen
    for analyzer in analyzers:
        totals = analyzer._totals.named.values()
        assert {total.parts["value"].device.type for total in totals if total.kind != "top"} == {
            "cuda"
        }


def test_a_layer_that_waits_is_noticed() -> None:
    """The tests here can fail: an analyzer that asks for a number in `see`."""

    class Waiting(Spread):
        def see(self, x: Tensor, point: ml.Point, batch: Batch) -> None:
            self.sum("first", x.sum().item())

    model, batch = case("llm")
    analyzer = Waiting()
    analyzer.begin(model)
    name = analyzer.reading[0].name
    x = record(model, batch, [name])[0][1]
    with pretending() as (mode, _):
        there = moved(batch, "llm", mode, GPUS[:1])
        analyzer.open(there, model.original_model)
        with pytest.raises(DataDependentOutputException):
            analyzer.receive(on_gpu(x, mode), analyzer.reading[0], there)


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
    write = writing.Write(neurons, value, at or None, complement)
    tokens = writing.tokens_of(model, write)
    targets = write.targets(mlps, model.original_model)
    name = place.activation_point(0)
    x = record(model, batch, [name])[0][1]
    running = ForwardPass()
    arguments = batch.inputs
    if site == "vision":
        arguments = {"grid_thw": batch.inputs["image_grid_thw"]}
    elif site == "audio":
        arguments = {"features": x}
    running.calls.append(Call(arguments, None))
    tokens.inputs._running[get_ident()] = running, []
    if isinstance(tokens, writing.TowerRows):
        tokens._hf_model = model.original_model
        tokens.lowest(x)
    else:
        tokens.chosen()  # once a pass, its token ids and its mask are looked up
        assert running.real is not None
    with pretending() as (mode, copies):
        running.calls[:] = on_gpu(running.calls, mode)
        running._made = on_gpu(running._made, mode)
        given = [(on_gpu(x, mode), on_gpu(target, mode)) for target in targets.values()]
        copies.seen.clear()
        for x, target in given:
            assert write(x, target, tokens).device == torch.device(GPUS[0])
        assert not copies.seen


def test_a_tower_looks_its_rows_up_once_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = case("vision")
    asked = []
    rows = Items.rows

    def count(items: Items, shape: torch.Size) -> Any:
        asked.append(shape[:-1].numel())
        return rows(items, shape)

    monkeypatch.setattr(Items, "rows", count)
    ml.mine(model, [(batch.inputs, batch.masks)], site="vision", progress=False)
    assert asked == [32, 16]  # of images and of videos, through three blocks each

"""Whether a model family is adapted faithfully, for those who write adapters."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from miner_lens.data.sample import Message
from miner_lens.models import attention
from miner_lens.models.access import layout, mlps
from miner_lens.models.bridge import unwrap, wrap
from miner_lens.models.experts import ExpertProjection
from miner_lens.models.generation import Inputs, prepare_inputs
from miner_lens.models.inside import bare, hf_model_of, is_bridge, processor_of
from miner_lens.models.points import Point, activation_points
from miner_lens.models.sites import Decoder, Tower, sites

Hook = tuple[str, Callable[..., Tensor | None]]


@dataclass(frozen=True)
class FamilyCheck:
    """One thing that was checked.

    Attributes:
        name: `"logits"`, `"hooks"`, `"neurons"`, `"layout"` or `"generation"`.
        passed: Whether it holds.
        says: What was found, in a sentence.
    """

    name: str
    passed: bool
    says: str


@dataclass(frozen=True)
class FamilyReport:
    """What `check_family` found; prints itself as a table.

    Attributes:
        architecture: Class name of the Hugging Face model.
        checks: One for each thing that was checked.
    """

    architecture: str
    checks: tuple[FamilyCheck, ...]

    @property
    def passed(self) -> bool:
        """Whether every check holds."""
        return all(check.passed for check in self.checks)

    def __str__(self) -> str:
        lines = [
            f"{'passed' if c.passed else 'FAILED':<8}{c.name:<12}{c.says}" for c in self.checks
        ]
        return "\n".join([self.architecture, *lines])


def check_family(model: Any, messages: Sequence[Message] | None = None) -> FamilyReport:
    """Hold a model family's adapter and layout against plain Hugging Face.

    It checks, on one conversation, that
    - logits are those of the plain model, and stay so while every hook point of X is read;
    - each site's X and each layer's queries and keys after RoPE are there once a pass;
    - writing 0 into X does what cutting off the down projection does;
    - the layout finds each medium, and gives each token to one modality;
    - greedy generation gives the same tokens.

    What fails, an exception included, is a line of the report. A bridge is copied to get a plain
    model, which takes its memory a second time; a plain model is wrapped, and unwrapped afterwards.

    Args:
        model: A `TransformerBridge`, or a plain Hugging Face model with a `.processor`.
        messages: The conversation, in Hugging Face chat format; default a question about a picture
            and a sound, as far as the model takes them.

    Raises:
        ValueError: The family is unknown, or the model has no processor.

    Example:
        report = ml.check_family(ml.load("my/checkpoint"))
        print(report)
        assert report.passed
    """
    processor = processor_of(model)
    if processor is None:
        raise ValueError("This model has no processor, so it cannot read messages: set .processor.")
    plain = unwrap(copy.deepcopy(bare(model))) if is_bridge(bare(model)) else hf_model_of(model)
    if messages is None:
        messages = _conversation(processor)
    batch = prepare_inputs(model, [messages])
    expected = _logits(plain, batch), _tokens(plain, batch)
    bridge = wrap(plain, processor, check=False)  # compared here, with media
    try:
        run = _Checks(bridge, batch, messages, *expected)
        named = ("logits", "hooks", "neurons", "layout", "generation")
        return FamilyReport(
            type(plain).__name__, tuple(_checked(name, getattr(run, name)) for name in named)
        )
    finally:
        unwrap(bridge)


class _Checks:
    """Each returns whether it holds, and what it found."""

    def __init__(
        self, bridge: Any, batch: Inputs, messages: Any, logits: Tensor, tokens: Tensor
    ) -> None:
        self.bridge, self.batch, self.messages = bridge, batch, messages
        self.plain_logits, self.plain_tokens = logits, tokens
        self.hf_model = hf_model_of(bridge)

    def logits(self) -> tuple[bool, str]:
        return self._compare(_logits(self.hf_model, self.batch), self.plain_logits)

    def hooks(self) -> tuple[bool, str]:
        seen: dict[str, list[tuple[int, ...]]] = {}

        def look(x: Tensor, hook: Any) -> None:
            seen.setdefault(hook.name, []).append(tuple(x.shape))

        points = self._points()
        names = [point.name for point in points]
        for layer, block in enumerate(self.bridge.blocks):
            names += (
                attention.rotated_points(self.bridge, layer) if "attn" in block._modules else ()
            )
        of_towers = {point.name for point in points if point.site != "llm"}
        for place in sites(self.hf_model).values():
            if isinstance(place, Tower):
                layers = range(len(place.mlps(self.hf_model)))
                of_towers |= {name for n in layers for name in place.attention_points(n)}
        names += sorted(of_towers - set(names))
        missing = [name for name in names if name not in self.bridge.hook_dict]
        if missing:
            return False, f"There is no hook point {missing[0]}."
        with self.bridge.hooks(fwd_hooks=[(name, look) for name in names]):
            same, says = self._compare(_logits(self.hf_model, self.batch), self.plain_logits)
        silent = [name for name in names if name not in seen]
        # A tower without its medium in the conversation does not run.
        silent = [name for name in silent if name not in of_towers]
        if silent:
            return False, f"Nothing passes through {silent[0]}."
        sizes = {name: x.down.in_features for name, x in self._mlps().items()}
        for name, shapes in seen.items():
            if name in sizes and any(shape[-1] != sizes[name] for shape in shapes):
                return False, f"{name} gives {shapes[0]}, where {sizes[name]} neurons are expected."
        quiet = sum(name not in seen for name in names)
        idle = f", {quiet} of towers that did not run" if quiet else ""
        return same, f"{len(names)} points{idle}; read, {says[0].lower()}{says[1:]}"

    def neurons(self) -> tuple[bool, str]:
        layer = len(self.bridge.blocks) // 2
        mlp = mlps(self.bridge)[layer]
        off: list[Hook] = [(Decoder().activation_point(layer), lambda x, hook: x * 0)]
        before = _logits(self.hf_model, self.batch)
        with self.bridge.hooks(fwd_hooks=off):
            written = _logits(self.hf_model, self.batch)
        if isinstance(mlp.down, ExpertProjection):
            handle = mlp.down.experts.register_forward_hook(lambda _, __, written: written * 0)
        else:
            handle = mlp.down.register_forward_pre_hook(lambda _, args: (args[0] * 0, *args[1:]))
        try:
            cut = _logits(self.hf_model, self.batch)
        finally:
            handle.remove()
        if torch.equal(written, before):
            return False, f"Writing 0 into X of layer {layer} changes nothing."
        same, says = self._compare(written, cut)
        return same, f"X of layer {layer} written as 0, the down projection cut off: {says}"

    def layout(self) -> tuple[bool, str]:
        ids = self.batch["input_ids"]
        masks = layout(self.bridge).masks(ids, self.batch.get("attention_mask"))
        counts = {name: int(mask.sum()) for name, mask in masks.items()}
        contents = [m["content"] for m in self.messages if not isinstance(m["content"], str)]
        media = {part["type"] for parts in contents for part in parts} & {"image", "video", "audio"}
        absent = sorted(kind for kind in media if not counts.get(kind))
        if absent:
            return False, f"The conversation has {absent[0]}, but no token of it is found."
        single = [masks[n] for n in masks if n not in ("special_text", "prompt")]
        if not torch.equal(torch.stack(single).sum(0), masks["prompt"].long()):
            return False, "Some token is of two modalities or of none."
        if not counts["special"]:
            return False, "No chat or media delimiter is found among the tokens."
        return True, ", ".join(f"{name} {count}" for name, count in counts.items() if count)

    def generation(self) -> tuple[bool, str]:
        tokens = _tokens(self.hf_model, self.batch)
        same = torch.equal(tokens, self.plain_tokens)
        new = tokens.shape[1] - self.batch["input_ids"].shape[1]
        found = "the same as" if same else "not those of"
        return same, f"{new} tokens, {found} plain Hugging Face."

    def _points(self) -> list[Point]:
        return [
            point for site in sites(self.hf_model) for point in activation_points(self.bridge, site)
        ]

    def _mlps(self) -> dict[str, Any]:
        return {point.name: mlps(self.bridge, point.site)[point.layer] for point in self._points()}

    def _compare(self, ours: Tensor, theirs: Tensor) -> tuple[bool, str]:
        if torch.equal(ours, theirs):
            return True, "Logits equal to the last bit."
        apart = float((ours.float() - theirs.float()).abs().max())
        largest = float(theirs.float().abs().max())
        says = f"Logits differ by up to {apart:.2g}, the largest being {largest:.3g}."
        if attention.rebuilt(attention.attentions_of(self.bridge)):
            says += " TransformerLens rebuilds this model's attention."
        return apart <= 64 * torch.finfo(ours.dtype).eps * largest, says


def _checked(name: str, check: Callable[[], tuple[bool, str]]) -> FamilyCheck:
    try:
        return FamilyCheck(name, *check())
    except Exception as error:  # whatever an adapter does wrong belongs into the report
        return FamilyCheck(name, False, f"{type(error).__name__}: {error}")


def _logits(hf_model: Any, batch: Inputs) -> Tensor:
    with torch.no_grad():
        logits: Tensor = hf_model(**batch).logits
    return logits


def _tokens(hf_model: Any, batch: Inputs) -> Tensor:
    options = {"do_sample": False, "max_new_tokens": 8}
    with torch.no_grad():
        tokens: Tensor = hf_model.generate(**batch, **options)
    return tokens


def _conversation(processor: Any) -> list[Message]:
    """A question about whatever media a processor takes."""
    text = "What is this?"
    parts: list[dict[str, Any]] = []
    if hasattr(processor, "image_processor"):
        rows = np.arange(64 * 64 * 3, dtype=np.uint32).reshape(64, 64, 3) % 251
        parts.append({"type": "image", "image": Image.fromarray(rows.astype(np.uint8))})
    if hasattr(processor, "feature_extractor"):
        rate = processor.feature_extractor.sampling_rate
        tone = np.sin(np.arange(rate) * 0.2).astype(np.float32) / 2
        parts.append({"type": "audio", "audio": tone, "sampling_rate": rate})
    if not parts:
        return [{"role": "user", "content": text}]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]

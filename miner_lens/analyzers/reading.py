"""The logit lens itself: a model's final norm and head, put on the residual stream of any layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from miner_lens.models.access import layout
from miner_lens.models.forcing import tokenizer_of
from miner_lens.models.forward import evaluating
from miner_lens.models.generation import inputs as model_inputs
from miner_lens.models.points import residual_points
from miner_lens.models.precision import full_precision

if TYPE_CHECKING:
    import pandas as pd

# So many logits are held at a time: 64 MB in float32.
MOST_LOGITS = 2**24


class Seen(NamedTuple):
    """What the lens shows at some positions.

    Attributes:
        entropy: Of the distribution over the vocabulary, in nats.
        tokens: The most probable tokens.
        probabilities: Theirs.
        answer: The probability of a token that was asked for.
    """

    entropy: Float[Tensor, "sample pos"]
    tokens: Int[Tensor, "sample pos rank"]
    probabilities: Float[Tensor, "sample pos rank"]
    answer: Float[Tensor, "sample pos"]


class Lens:
    """A model's final norm and head, to be put on the residual stream of any layer.

    Args:
        model: A `TransformerBridge`.

    Raises:
        ValueError: The model has no final norm or no head that can be called.
    """

    def __init__(self, model: Any) -> None:
        self.norm: Callable[[Tensor], Tensor] | None = getattr(model, "ln_final", None)
        self.head: Callable[[Tensor], Tensor] | None = getattr(model, "unembed", None)
        if self.norm is None or self.head is None:
            raise ValueError(
                "The logit lens needs a TransformerBridge with ln_final and unembed; this "
                f"{type(model).__name__} has no {'ln_final' if self.norm is None else 'unembed'}."
            )
        config = model.original_model.config.get_text_config()
        self.cap: float | None = getattr(config, "final_logit_softcapping", None)
        self.vocabulary = int(config.vocab_size)

    def logits(self, x: Float[Tensor, "*row d_model"]) -> Float[Tensor, "*row token"]:
        """The logits that the model would give if this were its last residual stream."""
        if self.norm is None or self.head is None:
            raise ValueError("This lens has neither norm nor head.")
        # Under autocast the residual stream may have another dtype than the weights.
        weight = getattr(self.head, "weight", x)
        logits = self.head(self.norm(x.to(weight.dtype) if weight.is_floating_point() else x))
        return logits if self.cap is None else torch.tanh(logits / self.cap) * self.cap

    @full_precision()
    def see(
        self, x: Float[Tensor, "sample pos d_model"], asked: Int[Tensor, " sample"], ranks: int
    ) -> Seen:
        """What the lens shows at each position, a few positions at a time.

        Args:
            x: The residual stream.
            asked: Of which token to give the probability, for each sample.
            ranks: How many of the most probable tokens to give.
        """
        step = max(1, MOST_LOGITS // (self.vocabulary * len(x)))
        parts = [self._see(part, asked, ranks) for part in torch.split(x, step, dim=1)]
        return Seen(*(torch.cat(some, 1) for some in zip(*parts, strict=True)))

    def _see(self, x: Tensor, asked: Tensor, ranks: int) -> Seen:
        logs = self.logits(x).float().log_softmax(-1)
        best = logs.topk(ranks, -1)
        wanted = asked.to(x.device)[:, None, None].expand(*logs.shape[:2], 1)
        answer = logs.gather(-1, wanted)[..., 0].exp()
        # Where a probability is 0 its logarithm may be -inf, and adds nothing.
        entropy = -(logs.exp() * logs.clamp(min=-1e4)).sum(-1)
        return Seen(entropy, best.indices, best.values.exp(), answer)


@dataclass(frozen=True, eq=False, repr=False)
class Reading:
    """The logit lens on one prompt.

    Attributes:
        prompt: The prompt's tokens, as text.
        modalities: What each token is, such as `image`.
        words: The most probable tokens, as text; [layer][pos][rank].
        tokens: Their ids.
        probabilities: Theirs.
        entropy: Of each distribution, in nats.
    """

    prompt: tuple[str, ...]
    modalities: tuple[str, ...]
    words: list[list[list[str]]]
    tokens: Int[Tensor, "layer pos rank"]
    probabilities: Float[Tensor, "layer pos rank"]
    entropy: Float[Tensor, "layer pos"]

    def to_frame(self) -> pd.DataFrame:
        """A table: layer, pos, modality, token, rank, top (as text), probability and entropy."""
        import pandas as pd

        rows = [
            (layer, pos, self.modalities[pos], self.prompt[pos], rank, word)
            for layer, some in enumerate(self.words)
            for pos, few in enumerate(some)
            for rank, word in enumerate(few)
        ]
        names = ["layer", "pos", "modality", "token", "rank", "top"]
        table = pd.DataFrame(rows, columns=names)
        table["probability"] = self.probabilities.flatten().numpy()
        table["entropy"] = self.entropy.repeat_interleave(self.tokens.shape[-1]).numpy()
        return table

    def __repr__(self) -> str:
        layers = len(self.words)
        lines = [f"Reading({len(self.prompt)} tokens, {layers} layers; most probable at the end)"]
        for layer, some in enumerate(self.words):
            best = zip(some[-1], self.probabilities[layer, -1].tolist(), strict=True)
            lines.append(f"{layer:>3}  " + "  ".join(f"{word!r} {p:.3f}" for word, p in best))
        return "\n".join(lines)


def logit_lens(model: Any, messages: Sequence[Mapping[str, Any]], k: int = 5) -> Reading:
    """Look through the logit lens at one prompt: each layer's `k` most probable tokens everywhere.

    Args:
        model: A `TransformerBridge` with a processor.
        messages: A conversation, as for `generate`.
        k: How many tokens.

    Raises:
        ValueError: The model has no processor, or no final norm and head.

    Example:
        ml.logit_lens(model, data[0].messages, k=3)
    """
    lens = Lens(model)
    given = model_inputs(model, messages)
    ids = given["input"]
    seen: dict[int, Seen] = {}
    nothing = torch.zeros(1, dtype=torch.long)

    def read(layer: int) -> Callable[..., None]:
        def hook(x: Tensor, hook: Any) -> None:
            seen[layer] = lens.see(x, nothing, k)

        return hook

    hooks = [(point.name, read(point.layer)) for point in residual_points(model)]
    with evaluating(model), torch.no_grad():
        model.run_with_hooks(**given, fwd_hooks=hooks)
    order = [seen[layer] for layer in sorted(seen)]
    tokens = torch.stack([one.tokens[0].cpu() for one in order])
    decode = tokenizer_of(model).batch_decode
    flat = decode(tokens.flatten()[:, None].tolist())
    layers, length, ranks = tokens.shape
    words = [
        [flat[(n * length + pos) * ranks :][:ranks] for pos in range(length)] for n in range(layers)
    ]
    masks = layout(model).masks(ids)
    names = ["text"] * length
    for name in ("special", *layout(model).media):
        for pos in masks[name][0].nonzero()[:, 0].tolist():
            names[pos] = name
    return Reading(
        tuple(decode(ids[0][:, None].tolist())),
        tuple(names),
        words,
        tokens,
        torch.stack([one.probabilities[0].cpu() for one in order]),
        torch.stack([one.entropy[0].cpu() for one in order]),
    )

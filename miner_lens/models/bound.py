"""Model inputs that are bound to a model, and the media that a row of tokens has among them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from miner_lens.models.bridge_methods import starts_later
from miner_lens.models.collate import Inputs
from miner_lens.models.copies import equal
from miner_lens.models.forward_pass import Call, past_length
from miner_lens.models.items import MEDIA_INPUTS, Items, items_of, owners
from miner_lens.models.modality import media_tokens

# What Hugging Face's generate passes in the place of media that it has encoded already.
ENCODED = "mm_encoder_outputs"

SEVERAL = (
    "Row {row} of these tokens fits several rows that are bound, whose media differ. A row is told "
    "by its tokens, and where these are equal by its memory: pass the tokens of the bound inputs "
    "themselves or slices of them, no copies, and give each of the inputs a tensor of its own "
    "(inputs['input'].clone()); or bind one of them at a time."
)
NOT_ALONE = (
    "start_at_layer is given a residual stream of {length} positions, which does not say which "
    "inputs it was made of, and {count} different rows of that length are bound. Bind the row that "
    "it was made of, one at a time."
)


class Run:
    """Model inputs that are bound.

    Attributes:
        own: The tensor of token ids, into which its owner may write.
        ids: The token ids when they were bound.
        tokens: The same in lists.
        by_token: What there is for each token.
        rest: What there is for media.
    """

    def __init__(self, hf_model: Any, inputs: Mapping[str, Any]) -> None:
        self._hf_model = hf_model
        rest: Inputs = dict(inputs)
        own, other = rest.pop("input_ids", None), rest.pop("input", None)
        own = other if own is None else own
        if own is not None and not isinstance(own, Tensor):
            raise TypeError(
                f"bind needs token ids as a tensor [batch pos], not as {type(own).__name__}. Use "
                "what ml.inputs returns, or a processor's with return_tensors='pt'."
            )
        if own is None:
            raise ValueError(
                "bind needs inputs with token ids, as ml.inputs returns them: it looks for "
                f"'input' or 'input_ids' and was given {', '.join(inputs) or 'nothing'}."
            )
        self.own = own
        self.ids = own.detach().clone()
        self.tokens: list[list[int]] = self.ids.tolist()
        self.mask = rest.pop("attention_mask", None)
        if self.mask is not None and not bool(self.mask.all()):
            raise ValueError(
                "bind takes inputs without padding, as tools that pass tokens only do not say "
                "where padding is. Bind one sample at a time, or several that were prepared one "
                "by one: ml.bind(model, *inputs)."
            )
        # Such as the kind of each token; all else belongs to media.
        shape = self.ids.shape
        self.by_token = {n: t for n, t in rest.items() if getattr(t, "shape", None) == shape}
        self.rest = {name: value for name, value in rest.items() if name not in self.by_token}

    def media_of(self, row: int) -> Inputs:
        """Return what there is for the media of a row.

        Raises:
            ValueError: It is not known which media these are.
        """
        if len(self.ids) == 1:
            return self.rest
        parts = {
            name: self._part(name, value, row) if _has_parts(value) else value
            for name, value in self.rest.items()
        }
        return {n: part for n, part in parts.items() if not _has_parts(part) or len(part)}

    def _part(self, name: str, value: Any, row: int) -> Any:
        """Return the entries of a media input that belong to a row."""
        owning = self._rows_owning(name, len(value))
        places = [place for place, owner in enumerate(owning) if owner == row]
        return value[places] if isinstance(value, Tensor) else [value[place] for place in places]

    def _rows_owning(self, name: str, length: int) -> list[int]:
        """Return the row that each entry of a media input belongs to.

        An input has an entry for each item, such as an image, or for each unit of one, such as a
        patch. Which of them it is, the number of entries tells.

        Args:
            name: Of the input; where it names no modality, it may be of any.
            length: How many entries it has.

        Raises:
            ValueError: Entries may belong to rows in several ways, or in none.
        """
        inputs = self.rest | {"input_ids": self.ids}
        present = [one for one, medium in MEDIA_INPUTS.items() if inputs.get(medium) is not None]
        named = [one for one in present if one in name or MEDIA_INPUTS[one] == name] or present
        counted: list[list[int]] = []
        guessed: list[list[int]] = []
        for items, rows in self._items(named, inputs):
            by_item = list(rows)
            if items is None:
                guessed.append(by_item)
            else:
                by_unit = [
                    row for row, size in zip(rows, items.sizes, strict=True) for _ in range(size)
                ]
                counted += [by_item, by_unit]
        if not any(len(way) == length for way in guessed) and self._each_has(named):
            guessed.append(list(range(len(self.ids))))
        # What is counted goes before what is guessed.
        ways = [way for way in counted if len(way) == length]
        ways = ways or [way for way in guessed if len(way) == length]
        if not ways or any(way != ways[0] for way in ways):
            raise ValueError(
                f"It is not known whose parts of {name!r} are which of the {len(self.ids)} rows "
                "that are bound. Bind each sample by itself: ml.bind(model, *inputs)."
            )
        return ways[0]

    def _items(
        self, modalities: Sequence[str], inputs: Inputs
    ) -> Iterator[tuple[Items | None, tuple[int, ...]]]:
        """Yield the media of modalities, None where they are not counted, and the row of each."""
        for modality in modalities:
            encoder = self._hf_model.get_encoder(modality=modality)
            items = items_of(self._hf_model, encoder, inputs, modality)
            placeholders = self._placeholders(modality)
            if items is not None and items.tokens is not None:
                yield items, owners(placeholders, items.tokens)
                continue
            medium = inputs[MEDIA_INPUTS[modality]]
            count = len(medium)
            if count == len(self.ids) and medium.ndim > 4 and not self._each_has([modality]):
                # These may be rows, each with so many media as the most have.
                continue
            with suppress(ValueError):
                yield None, owners(placeholders, [sum(placeholders) // max(1, count)] * count)

    def _placeholders(self, modality: str) -> list[int]:
        token = media_tokens(self._hf_model.config)[modality]
        counts: list[int] = (self.ids == token).sum(-1).tolist()
        return counts

    def _each_has(self, modalities: Sequence[str]) -> bool:
        """Return True if there are media of these modalities in each row."""
        return all(all(self._placeholders(modality)) for modality in modalities)


@dataclass(frozen=True)
class Row:
    """A row of model inputs that are bound."""

    run: Run
    number: int

    @property
    def tokens(self) -> list[int]:
        """The token ids."""
        return self.run.tokens[self.number]

    @property
    def media(self) -> Inputs:
        """What there is for the row's media."""
        return self.run.media_of(self.number)

    def is_at(self, ids: Tensor, row: int) -> bool:
        """Return True if a row of tokens begins where this one does in memory."""
        return _address(ids, row) == _address(self.run.own, self.number)

    def is_like(self, other: Row) -> bool:
        """Return True if another row has the same media."""
        mine, theirs = self.media, other.media
        return mine.keys() == theirs.keys() and all(equal(mine[n], theirs[n]) for n in mine)

    def by_token(self, name: str, ids: Tensor, media: Sequence[int]) -> Tensor:
        """Return what there is for each of these tokens, which fit the row."""
        values, known = (one.to(ids.device) for one in (self._of(name), self.run.ids[self.number]))
        both = min(len(ids), len(known))
        moved = torch.zeros_like(ids, dtype=values.dtype)
        kinds = ids.new_tensor(media)
        if torch.equal(torch.isin(ids[:both], kinds), torch.isin(known[:both], kinds)):
            # More tokens, such as generated ones, are text.
            moved[:both] = values[:both]
            return moved
        for token in media:
            moved[ids == token] = values[known == token][:1]
        return moved

    def _of(self, name: str) -> Tensor:
        values: Tensor = self.run.by_token[name][self.number]
        return values


class Bound:
    """Model inputs, and how they complete passes with tokens alone."""

    def __init__(self, hf_model: Any, runs: Sequence[Run], media: Mapping[str, int]) -> None:
        self._hf_model = hf_model
        self._runs = list(runs)
        self._rows = [Row(run, number) for run in runs for number in range(len(run.ids))]
        tokens = {token for row in self._rows for token in row.tokens}
        self._media = {name: token for name, token in media.items() if token in tokens}
        self._names = {ENCODED, *(n for run in runs for n in (*run.rest, *run.by_token))}

    def fill(
        self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """A forward pre-hook of the Hugging Face model that adds what a pass lacks."""
        given = Call.of(module, args, kwargs).arguments
        if past_length(given) or any(given.get(name) is not None for name in self._names):
            return None
        ids, residual = given.get("input_ids"), given.get("inputs_embeds")
        if ids is None and isinstance(residual, Tensor) and starts_later(self._hf_model):
            # The pass is that of the inputs, and TransformerLens puts the residual stream into it.
            row = self._alone(residual.shape[1])
            ids = row.run.ids[row.number].to(residual.device).expand(len(residual), -1)
            given = {name: value for name, value in kwargs.items() if name != "inputs_embeds"}
            made = {"input_ids": ids} | self._inputs(ids, [row] * len(ids), None)
            return args, given | made | _not_none(given)
        if not isinstance(ids, Tensor) or ids.ndim != 2:
            return None
        mask = given.get("attention_mask")
        mask = mask if isinstance(mask, Tensor) and mask.shape == ids.shape else None
        rows = self._matched(ids, mask)
        if not any(row is not None and self._placeholders(row.tokens) for row in rows):
            return None
        if given.get("position_ids") is not None:
            raise ValueError(
                "This pass was given position_ids beside tokens alone, and positions may depend "
                "on the media. Leave them out, or pass all inputs: to generate, use ml.generate."
            )
        return args, kwargs | self._inputs(ids, rows, mask) | _not_none(kwargs)

    def _placeholders(self, tokens: Sequence[int]) -> list[int]:
        media = self._media.values()
        return [token for token in tokens if token in media]

    def _matched(self, ids: Tensor, mask: Tensor | None) -> list[Row | None]:
        """Return the bound row whose media each row of a pass has; None for rows of text."""
        rows: list[list[int]] = ids.tolist()
        if mask is not None:
            real = (mask != 0).tolist()
            rows = [
                [token for token, is_real in zip(*pair, strict=True) if is_real]
                for pair in zip(rows, real, strict=True)
            ]
        return [self._match(ids, number, tokens) for number, tokens in enumerate(rows)]

    def _match(self, ids: Tensor, number: int, tokens: list[int]) -> Row | None:
        wanted = self._placeholders(tokens)
        equal = [row for row in self._rows if row.tokens == tokens]
        if not wanted:
            return equal[0] if equal else None
        alike = [row for row in self._rows if self._placeholders(row.tokens) == wanted]
        begun = [row for row in alike if row.tokens == tokens[: len(row.tokens)]]
        longest = max((len(row.tokens) for row in begun), default=0)
        begun = [row for row in begun if len(row.tokens) == longest]
        rows = equal or begun or alike
        if not rows:
            here = zip(self._counts(tokens), self._media, strict=True)
            counts = " and ".join(f"{count} placeholders of {name}" for count, name in here)
            bound = (" and ".join(map(str, self._counts(row.tokens))) for row in self._rows)
            raise ValueError(
                f"Row {number} of these tokens has {counts} in it, and the inputs that are bound "
                f"{', '.join(dict.fromkeys(bound))}. Bind the inputs that belong to the tokens, "
                "with the same media in the same order."
            )
        if len(rows) > 1:
            rows = [row for row in rows if row.is_at(ids, number)] or rows
        if any(not row.is_like(rows[0]) for row in rows[1:]):
            raise ValueError(SEVERAL.format(row=number))
        return rows[0]

    def _counts(self, tokens: list[int]) -> list[int]:
        return [tokens.count(token) for token in self._media.values()]

    def _alone(self, length: int) -> Row:
        """Return the only row of a length.

        Raises:
            ValueError: There are several different ones, or none.
        """
        rows = [row for row in self._rows if len(row.tokens) == length]
        different = [
            row
            for number, row in enumerate(rows)
            if not any(row.tokens == one.tokens and row.is_like(one) for one in rows[:number])
        ]
        if len(different) != 1:
            raise ValueError(NOT_ALONE.format(length=length, count=len(different)))
        return rows[0]

    def _inputs(self, ids: Tensor, rows: Sequence[Row | None], mask: Tensor | None) -> Inputs:
        """Return the rest of the inputs of a pass with these tokens."""
        parts = list(self._parts(rows))
        made = {
            name: _joined(name, [part[name] for part in parts if name in part])
            for name in dict.fromkeys(name for part in parts for name in part)
        }
        by_token = {
            name: tensor.dtype for run in self._runs for name, tensor in run.by_token.items()
        }
        media = list(self._media.values())
        for name, dtype in by_token.items():
            made[name] = torch.zeros_like(ids, dtype=dtype)
            for number, row in enumerate(rows):
                if row is not None and name in row.run.by_token:
                    real = slice(None) if mask is None else mask[number] != 0
                    made[name][number, real] = row.by_token(name, ids[number, real], media)
        masks = [run.mask for run in self._runs if run.mask is not None]
        if masks:
            made["attention_mask"] = torch.ones_like(ids, dtype=masks[0].dtype)
        return made

    def _parts(self, rows: Sequence[Row | None]) -> Iterator[Inputs]:
        """What there is for media, of a whole run at once where its rows are in order."""
        number = 0
        while number < len(rows):
            row = rows[number]
            whole = [] if row is None else [Row(row.run, one) for one in range(len(row.run.ids))]
            if row is not None and list(rows[number : number + len(whole)]) == whole:
                yield row.run.rest
                number += len(whole)
                continue
            if row is not None and self._placeholders(row.tokens):
                yield row.media
            number += 1


def _address(ids: Tensor, row: int) -> tuple[torch.device, int]:
    return ids.device, ids.data_ptr() + row * ids.stride(0) * ids.element_size()


def _has_parts(value: Any) -> bool:
    return isinstance(value, list | tuple) or (isinstance(value, Tensor) and value.ndim > 0)


def _not_none(arguments: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in arguments.items() if value is not None}


def _joined(name: str, values: list[Any]) -> Any:
    """One value of a pass, of those of its rows."""
    if len(values) == 1 or not _has_parts(values[0]):
        return values[0]
    if not isinstance(values[0], Tensor):
        return [one for value in values for one in value]
    try:
        return torch.cat(values)
    except RuntimeError as error:
        shapes = ", ".join(str(list(value.shape)) for value in values)
        raise ValueError(
            f"Media of these rows cannot be in one pass, as their {name!r} are of shapes {shapes}. "
            "Pass fewer rows at a time."
        ) from error

"""Batches of the same samples with other prompts: what the latent vectors are held against."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from coordexp.config.schema.prompt import CLASSES_PLACE, Prompt
from coordexp.data.collator import Collate
from coordexp.data.latent.batches import LatentBatch, batch_of_prompts, without_span
from coordexp.data.latent.spans import SPAN, cut_prompt
from coordexp.losses.columns import CoordColumns
from coordexp.losses.inputs import IGNORE_INDEX, SupervisedRows

NONE, CUT = "none", "cut"


@dataclass(frozen=True)
class PromptBatch:
    """What a forward with another prompt needs, and what it should predict.

    targets_R: tokens that the rows `positions_R` predict.  places_R: see `answers.answer_places`.
    """

    inputs: dict[str, Any]
    positions_R: Tensor
    targets_R: Tensor
    places_R: Tensor


@dataclass(frozen=True)
class OtherPrompts:
    """Collates samples with other prompts. With plain fields, so that workers can be given it.

    NONE: without a list; nothing stands in the place of `{classes}`, and a prompt that has no such place is left out.
    CUT: the first `num_latents` tokens of the prompt's text, which is what `coordexp infer --cut-prompt` asks.

    tok: a tokenizer of transformers.  plain, opening: see `with_latents`.
    """

    plain: Collate
    tok: Any
    columns: CoordColumns
    opening: tuple[int, ...]
    without_list: tuple[int, ...]
    num_latents: int

    @classmethod
    def of(
        cls,
        prompt: Prompt,
        plain: Collate,
        tok: Any,
        columns: CoordColumns,
        opening: Sequence[int],
        num_latents: int,
    ) -> OtherPrompts:
        """For samples that were asked with `prompt`."""
        text = prompt.user.replace(CLASSES_PLACE, "") if prompt.names_classes else ""
        without_list = tok.encode(text, add_special_tokens=False)
        return cls(plain, tok, columns, tuple(opening), tuple(without_list), num_latents)

    def cut(self, text_ids: Sequence[int]) -> list[int]:
        """The tokens of CUT in the place of those of the text."""
        text = cut_prompt(self.tok, text_ids, self.num_latents)
        return list(self.tok.encode(text, add_special_tokens=False))

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
        """Arguments of `PromptBatch` by name of the prompt, as plain mappings, which can be moved to a device."""
        text = self.plain([without_span(feature) for feature in features])
        rows = SupervisedRows.from_labels(text["labels"], self.columns)
        prompts = {
            NONE: [list(self.without_list)] * len(features),
            CUT: [self.cut(feature["input_ids"][slice(*feature[SPAN])]) for feature in features],
        }
        made = {
            name: batch_of_prompts(features, ids, self.plain, self.opening, self.columns, rows)
            for name, ids in prompts.items()
        }
        return {name: self._plain_batch(batch, text, rows) for name, batch in made.items()}

    def _plain_batch(self, batch: LatentBatch, text: dict[str, Any], rows: SupervisedRows) -> dict[str, Any]:
        return {
            "inputs": batch.model_inputs(text),
            "positions_R": batch.positions_R,
            "targets_R": rows.targets_R,
            "places_R": batch.places_R,
        }


class ShareOfSamples:
    """Every n-th encoded sample: those of one rank. Each rank has as many; samples that fill up teach nothing."""

    def __init__(self, samples: Any, rank: int, num_ranks: int) -> None:
        self._samples, self._rank, self._num_ranks = samples, rank, num_ranks

    def __len__(self) -> int:
        return (len(self._samples) + self._num_ranks - 1) // self._num_ranks

    def __getitem__(self, index: int) -> dict[str, Any]:
        place = index * self._num_ranks + self._rank
        if place < len(self._samples):
            sample: dict[str, Any] = self._samples[place]
            return sample
        sample = self._samples[0]
        return {**sample, "labels": [IGNORE_INDEX] * len(sample["labels"])}

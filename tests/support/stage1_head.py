"""A nano Qwen3-VL, a batch with images, and a stage-1 forward through a head as the trainer does it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from coordexp.codec.coord_vocab import CoordVocab
from coordexp.head.run import RowsHead
from coordexp.losses.columns import CoordColumns
from coordexp.losses.inputs import LossInputs, SupervisedRows
from coordexp.losses.stage1 import Stage1Terms, Stage1Weights, combine, stage1_terms
from coordexp.losses.sums import add_up

ALL_TERMS = Stage1Weights(soft_ce_weight=0.5, w1_weight=2.0, ce_weight=0.25, gate_weight=1.5)


def accuracy(logits_RV: Tensor, targets_R: Tensor) -> tuple[Tensor, Tensor]:
    """Top-1 hits and rows."""
    hits = (logits_RV.argmax(dim=-1) == targets_R).sum()
    return hits.float(), torch.full_like(hits, targets_R.numel()).float()


class Batch(NamedTuple):
    inputs: dict[str, Tensor]
    rows: SupervisedRows
    columns: CoordColumns


def load(path: Path, *, tied: bool = True) -> nn.Module:
    """The model in train mode; untied, its head has weights of its own that differ from the embedding."""
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(path).train()
    if not tied:
        model.config.tie_word_embeddings = model.config.text_config.tie_word_embeddings = False
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone().mul_(1.1))
    return model


def with_lora(model: nn.Module, **settings: Any) -> nn.Module:
    """The model under PEFT's LoRA, with adapters that are not zero."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(3)
    model = get_peft_model(model, LoraConfig(r=4, init_lora_weights=False, **settings))
    model.enable_input_require_grads()
    return model


def make_batch(path: Path) -> Batch:
    """Two ragged samples: an image of 4 visual tokens, then text and boxes; all but the prompt supervised."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path)
    vocab = CoordVocab.from_tokenizer(tokenizer)
    image, start, end = (
        tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in ("image_pad", "vision_start", "vision_end")
    )
    g = torch.Generator().manual_seed(1)
    ids = torch.randint(40, 400, (2, 70), generator=g)
    ids[:, 1:7] = torch.tensor([start, *[image] * 4, end])
    for first in range(12, 68, 8):
        ids[:, first : first + 4] = vocab.ids[0] + torch.randint(0, 1000, (2, 4), generator=g)
    attention_mask = torch.ones_like(ids)
    attention_mask[1, 60:] = 0
    labels = ids.masked_fill(attention_mask == 0, -100)
    labels[:, :10] = -100
    inputs = {
        "input_ids": ids,
        "attention_mask": attention_mask,
        "mm_token_type_ids": (ids == image).long(),
        "pixel_values": torch.randn(2 * 16, 3 * 2 * 8 * 8, generator=g),
        "image_grid_thw": torch.tensor([[1, 4, 4]] * 2),
    }
    columns = CoordColumns(vocab.ids)
    return Batch(inputs, SupervisedRows.from_labels(labels, columns), columns)


def forward(
    model: nn.Module, unwrapped: nn.Module, batch: Batch, mode: str, weights: Stage1Weights = ALL_TERMS
) -> tuple[Tensor, dict[str, float]]:
    """The loss, with denominators as of a larger step, and all that would be logged."""
    rows = batch.rows
    hits: list[tuple[Tensor, Tensor]] = []

    def objective(inputs: LossInputs) -> tuple[Tensor, Stage1Terms]:
        terms = stage1_terms(inputs, weights)
        return combine(terms, 3.0 * rows.num_text, 2.0 * rows.num_coord), terms.detach()

    loss, parts = RowsHead(mode, batch.columns)(
        model,
        unwrapped,
        batch.inputs,
        rows,
        weights.needs(mass_monitor=True),
        objective,
        lambda logits_RV, piece: hits.append(accuracy(logits_RV, piece.targets_R)),
    )
    metrics = Stage1Terms.merge(parts).metrics() | {"token_acc": add_up(hits)}
    return loss, {key: float(total / count) for key, (total, count) in metrics.items()}

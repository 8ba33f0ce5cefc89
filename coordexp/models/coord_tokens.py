"""Give a checkpoint the 1000 coordinate tokens: new tokenizer entries and new embedding rows.

    coordexp model add-coord-tokens --model Qwen3-VL-2B-Instruct --output runs/models/qwen3-vl-coord

Existing rows keep their values bit for bit, so logits over the old vocabulary do not change. The embedding
matrix is often padded beyond the tokenizer; it only ever grows. Tied embeddings stay tied.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)

from coordexp.codec.coord_vocab import COORD_TOKENS, CoordVocab
from coordexp.errors import ConfigError
from coordexp.models.model_files import carry_prompt, save_processor
from coordexp.models.staging import is_up_to_date, staged_directory, write_stamp
from coordexp.models.tiny_tokenizer import added_coord_tokens

STAMP_NAME = "coordexp_coord_tokens.json"
NOISE_SCALE = 0.1
"""Standard deviation of the noise on a new row, relative to that of the existing rows, per column."""


class Expansion(NamedTuple):
    """What `add_coord_tokens` did.

    num_added: tokens the source tokenizer lacked (0: nothing to do, nothing written);
    written: False when the output directory already held this very result.
    """

    num_added: int
    written: bool


def add_coord_tokens(
    model_dir: str | Path, output_dir: str | Path, *, seed: int = 0, pad_to_multiple_of: int = 64
) -> Expansion:
    """Copy the checkpoint `model_dir` to `output_dir` with every coordinate token and a grown embedding.

    A new row is the mean row of the old tokens plus Gaussian noise from `seed`; weights keep their dtype.

    Raises:
        ConfigError: `model_dir` is no checkpoint, `output_dir` holds something else, or the tokenizer cannot
            encode coordinate tokens as single ids even after they were added.
    """
    return add_tokens(
        model_dir,
        output_dir,
        NewTokens(COORD_TOKENS, STAMP_NAME, "coordexp.models.coord_tokens/1", CoordVocab.from_tokenizer),
        seed=seed,
        pad_to_multiple_of=pad_to_multiple_of,
    )


class NewTokens(NamedTuple):
    """Tokens that a checkpoint is given.

    texts: each becomes one id.  stamp, generator: of the folder that is written.
    check: raises ConfigError for a tokenizer that cannot encode them, after they were added.
    """

    texts: tuple[str, ...]
    stamp: str
    generator: str
    check: Callable[[PreTrainedTokenizerBase], object]


def add_tokens(
    model_dir: str | Path, output_dir: str | Path, tokens: NewTokens, *, seed: int, pad_to_multiple_of: int
) -> Expansion:
    """Copy a checkpoint with those of `tokens` that it lacks; as `add_coord_tokens`, which see."""
    model_dir, output_dir = Path(model_dir), Path(output_dir)
    _check_checkpoint(model_dir)
    processor = AutoProcessor.from_pretrained(model_dir)
    tokenizer = processor.tokenizer if isinstance(processor, ProcessorMixin) else processor
    missing = [text for text in tokens.texts if len(tokenizer.encode(text, add_special_tokens=False)) != 1]
    if not missing:
        return Expansion(num_added=0, written=False)
    stamp = {
        "generator": tokens.generator,
        "source": {
            p.name: [p.stat().st_size, p.stat().st_mtime_ns] for p in model_dir.iterdir() if p.is_file()
        },
        "seed": seed,
        "pad_to_multiple_of": pad_to_multiple_of,
    }
    if is_up_to_date(output_dir, tokens.stamp, stamp):
        return Expansion(num_added=len(missing), written=False)
    with staged_directory(output_dir) as staging_dir:
        old_vocab = tokenizer.get_vocab()
        tokenizer.add_tokens(added_coord_tokens(missing))
        tokens.check(tokenizer)
        model = AutoModelForImageTextToText.from_pretrained(model_dir, dtype="auto")
        ids = tokenizer.convert_tokens_to_ids(list(tokens.texts))
        new_ids = [i for i, text in zip(ids, tokens.texts, strict=True) if text not in old_vocab]
        expand_embeddings(
            model,
            tokenizer,
            sorted(old_vocab.values()),
            new_ids,
            seed=seed,
            pad_to_multiple_of=pad_to_multiple_of,
        )
        model.save_pretrained(staging_dir)
        save_processor(processor, staging_dir)
        carry_prompt([model_dir], staging_dir)
        write_stamp(staging_dir, tokens.stamp, stamp)
    return Expansion(num_added=len(missing), written=True)


def expand_embeddings(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    old_ids: Sequence[int],
    new_ids: Sequence[int],
    *,
    seed: int,
    pad_to_multiple_of: int,
) -> None:
    """Grow `model` in place to hold every id of `tokenizer`, and initialise what is new.

    Rows `old_ids` and the padding between them stay untouched. Rows `new_ids`, and all rows by which the
    matrix grew, become mean(old rows) + NOISE_SCALE * std(old rows) * noise. An untied output head is treated
    the same way from its own rows.
    """
    old_size = _weight_of(model.get_input_embeddings()).shape[0]
    padded = -(-len(tokenizer) // pad_to_multiple_of) * pad_to_multiple_of
    new_size = max(old_size, padded)
    if new_size > old_size:
        model.resize_token_embeddings(new_size, mean_resizing=False)
    rows_to_init = sorted({*new_ids, *range(old_size, new_size)})
    matrices = [_weight_of(model.get_input_embeddings())]
    head = model.get_output_embeddings()
    if head is not None and head.weight is not matrices[0]:
        matrices.append(_weight_of(head))
    generator = torch.Generator().manual_seed(seed)
    for weight_VH in matrices:
        _init_rows(weight_VH, old_ids, rows_to_init, generator)


def _weight_of(module: nn.Module) -> Tensor:
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight


@torch.no_grad()
def _init_rows(
    weight_VH: Tensor, old_ids: Sequence[int], new_ids: Sequence[int], generator: torch.Generator
) -> None:
    """weight_VH[new_ids] = mean + NOISE_SCALE * std * noise over weight_VH[old_ids]; computed in float32."""
    old_rows_OH = weight_VH[torch.tensor(old_ids)].float()
    noise_NH = torch.randn(len(new_ids), weight_VH.shape[1], generator=generator)
    rows_NH = old_rows_OH.mean(dim=0) + NOISE_SCALE * old_rows_OH.std(dim=0) * noise_NH
    weight_VH[torch.tensor(new_ids)] = rows_NH.to(weight_VH.dtype)


def _check_checkpoint(model_dir: Path) -> None:
    if not (model_dir / "config.json").is_file():
        raise ConfigError(
            f"{model_dir}: no config.json there, expected a checkpoint directory of the Qwen3-VL family. "
            "Pass the directory that holds config.json and the weights as --model."
        )

"""Coord-offset adapter: the rows of the coordinate tokens are trained as offsets to a matrix that may stay frozen.

    embedding of coordinate token k     W_embed[k] + offset_embed[k]
    logit of coordinate token k         hidden . (W_head[k] + offset_head[k])

`tie_head` uses one table for both. The tables are parameters of the very modules that use them, `OffsetEmbedding` and
`OffsetLinear`, which take the places of the model's embedding and head: generation, LoRA, the fused head, self-context
and the gathering of DeepSpeed ZeRO-3 meet them as any other weight, named `*.coord_offset_KH` beside `*.weight`.

Checkpoints hold the tables in a file of their own, OFFSET_FILE (LoRA checkpoints save nothing else of the model), and
`models.merge_offset` turns such a checkpoint into a plain one. Whoever hands weights to another engine takes them from
`fold_module`: a plain model has no place for the tables.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from coordexp.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

OFFSET_FILE = "coord_offset.safetensors"
TABLE = "coord_offset_KH"


class OffsetEmbedding(nn.Embedding):
    """`base` plus a table row for each coordinate token; shares the weight of `base`."""

    coord_ids_K: Tensor
    bin_of_id_V: Tensor

    def __init__(self, base: nn.Embedding, table_KH: nn.Parameter, coord_ids_K: Tensor) -> None:
        super().__init__(base.num_embeddings, base.embedding_dim, base.padding_idx, device="meta")
        self.weight = base.weight
        self.coord_offset_KH = table_KH
        bin_of_id_V = torch.full((base.num_embeddings,), -1, device=coord_ids_K.device)
        bin_of_id_V[coord_ids_K] = torch.arange(coord_ids_K.numel(), device=coord_ids_K.device)
        self.register_buffer("coord_ids_K", coord_ids_K, persistent=False)
        self.register_buffer("bin_of_id_V", bin_of_id_V, persistent=False)
        self.train(base.training)

    def forward(self, input: Tensor) -> Tensor:
        """[..., H] in the dtype of the weight; the sum is rounded once, as in a merged weight."""
        embeds = super().forward(input)
        bins = self.bin_of_id_V[input]
        offsets = F.embedding(bins.clamp(min=0), self.coord_offset_KH) * (bins >= 0).unsqueeze(-1)
        return (embeds + offsets).to(embeds.dtype)


class OffsetLinear(nn.Linear):
    """`base` plus a table row for the output of each coordinate token; shares weight and bias of `base`."""

    coord_ids_K: Tensor

    def __init__(self, base: nn.Linear, table_KH: nn.Parameter, coord_ids_K: Tensor) -> None:
        super().__init__(base.in_features, base.out_features, bias=base.bias is not None, device="meta")
        self.weight, self.bias = base.weight, base.bias
        self.coord_offset_KH = table_KH
        self.register_buffer("coord_ids_K", coord_ids_K, persistent=False)
        self.train(base.training)

    def forward(self, input: Tensor) -> Tensor:
        """Logits [..., V]."""
        logits = super().forward(input)
        offsets = F.linear(input, self.coord_offset_KH.to(input.dtype))
        return logits.index_add_(-1, self.coord_ids_K, offsets.to(logits.dtype))


class OffsetAdapter(NamedTuple):
    """The two modules of a model that carry the adapter."""

    embedding: OffsetEmbedding
    head: OffsetLinear

    @property
    def tie_head(self) -> bool:
        """Is it one table?"""
        return self.embedding.coord_offset_KH is self.head.coord_offset_KH

    @property
    def unties(self) -> bool:
        """Does merging give embedding and head, one matrix until now, different rows?"""
        return self.embedding.weight is self.head.weight and not self.tie_head

    @property
    def tables(self) -> dict[str, nn.Parameter]:
        """`embed`, and `head` where it has a table of its own."""
        tables = {"embed": self.embedding.coord_offset_KH}
        return tables if self.tie_head else {**tables, "head": self.head.coord_offset_KH}


def attach_coord_offset(model: PreTrainedModel, coord_ids: Sequence[int], *, tie_head: bool) -> OffsetAdapter:
    """Give `model` the adapter, with tables of zeros in float32 at least; its logits stay what they were.

    Call it on a freshly loaded model, before LoRA and wrappers. `coord_ids` are in bin order.

    Raises:
        ConfigError: embedding or head is no plain `nn.Embedding` / `nn.Linear` (quantised, adapted, offloaded).
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    for module, plain in ((embedding, nn.Embedding), (head, nn.Linear)):
        if type(module) is not plain or hasattr(module, "_hf_hook"):
            raise ConfigError(
                f"custom.coord_offset: the model has a {type(module).__name__} where a plain torch.nn."
                f"{plain.__name__} on one device is expected; load it unquantised and without a device map."
            )
    assert isinstance(embedding, nn.Embedding)
    assert isinstance(head, nn.Linear)
    dtype = torch.promote_types(embedding.weight.dtype, torch.float32)
    device = embedding.weight.device
    ids_K = torch.tensor(list(coord_ids), device=device)

    def table() -> nn.Parameter:
        return nn.Parameter(torch.zeros(len(coord_ids), embedding.embedding_dim, dtype=dtype, device=device))

    embed_table = table()
    offset = OffsetAdapter(
        OffsetEmbedding(embedding, embed_table, ids_K),
        OffsetLinear(head, embed_table if tie_head else table(), ids_K),
    )
    model.set_input_embeddings(offset.embedding)
    model.set_output_embeddings(offset.head)
    if tie_head:  # the way a transformers model says which of its tensors are one
        names = {module: name for name, module in model.named_modules()}
        tied = {f"{names[offset.head]}.{TABLE}": f"{names[offset.embedding]}.{TABLE}"}
        model._tied_weights_keys = {**(model._tied_weights_keys or {}), **tied}
    return offset


def coord_offset_of(model: nn.Module) -> OffsetAdapter | None:
    """The adapter of a model (also under LoRA or a wrapper), None without one.

    Raises:
        ConfigError: the adapter exists more than once, which PEFT's `modules_to_save` on embedding or head leads to, or
            DoRA, which scales whole rows, is on one of them.
    """
    embeddings = [module for module in model.modules() if isinstance(module, OffsetEmbedding)]
    heads = [module for module in model.modules() if isinstance(module, OffsetLinear)]
    if not embeddings and not heads:
        return None
    if len(embeddings) != 1 or len(heads) != 1:
        raise ConfigError(
            f"custom.coord_offset: found {len(embeddings)} embeddings and {len(heads)} heads with offsets, expected "
            "one of each. modules_to_save trains a whole copy of embedding or head, rows of coordinate tokens "
            "included; use one or the other."
        )
    if any(_is_under_dora(module) for module in model.modules()):
        raise ConfigError(
            "custom.coord_offset: use_dora on embedding or head scales their rows without the offsets, so that the two "
            "cannot be merged into one weight; leave embed_tokens and lm_head out of target_modules."
        )
    return OffsetAdapter(embeddings[0], heads[0])


def _is_under_dora(module: nn.Module) -> bool:
    """Is it a DoRA layer around an embedding or head with offsets?"""
    from peft.tuners.lora import LoraLayer

    return (
        isinstance(module, LoraLayer)
        and isinstance(module.get_base_layer(), OffsetEmbedding | OffsetLinear)
        and any(module.use_dora.values())
    )


# --- checkpoints ---


@dataclass(frozen=True)
class SavedOffset:
    """What OFFSET_FILE holds."""

    tables: dict[str, Tensor]
    """`embed` [K, H], and `head` [K, H] where the head has its own."""
    coord_ids_K: Tensor

    @property
    def tie_head(self) -> bool:
        """Is it one table?"""
        return "head" not in self.tables


def save_coord_offset(
    model: nn.Module, directory: str | Path, state: Mapping[str, Tensor] | None = None
) -> None:
    """Write OFFSET_FILE into `directory`; nothing for a model without the adapter.

    Arguments:
        state: gathered tensors by parameter name, where the parameters of `model` are partitioned (ZeRO-3).
    """
    offset = coord_offset_of(model)
    if offset is None:
        return
    tensors = {"coord_ids": offset.embedding.coord_ids_K.cpu()}
    for key, table_KH in offset.tables.items():
        names = [n for n, p in model.named_parameters(remove_duplicate=False) if p is table_KH]
        gathered = [state[name] for name in names if name in state] if state is not None else []
        found = gathered[0] if gathered else table_KH.detach()
        if found.numel() == 0:
            logger.warning(
                "%s is not written: ZeRO-3 gathers no weights at saving (stage3_gather_16bit_weights_on_model_save: "
                "false); the offsets are in DeepSpeed's own checkpoint only.",
                OFFSET_FILE,
            )
            return
        tensors[key] = found.cpu().contiguous()
    save_file(tensors, Path(directory) / OFFSET_FILE, metadata={"format": "pt"})


def read_coord_offset(directory: str | Path) -> SavedOffset | None:
    """What a checkpoint folder holds of the adapter; None when it has no OFFSET_FILE."""
    path = Path(directory) / OFFSET_FILE
    if not path.is_file():
        return None
    tensors = load_file(path)
    return SavedOffset(
        {key: tensors[key] for key in ("embed", "head") if key in tensors}, tensors["coord_ids"]
    )


@torch.no_grad()
def restore_coord_offset(offset: OffsetAdapter, saved: SavedOffset, *, source: str | Path) -> None:
    """Fill the tables from a checkpoint; ConfigError naming `source` when they do not fit."""
    ours, theirs = _shapes(offset.tables), _shapes(saved.tables)
    if ours != theirs:
        raise ConfigError(
            f"{Path(source) / OFFSET_FILE}: holds tables {theirs}, the run expects {ours}; set "
            "custom.coord_offset.tie_head (and the model) to what the checkpoint was trained with."
        )
    if not torch.equal(offset.embedding.coord_ids_K.cpu(), saved.coord_ids_K):
        raise ConfigError(
            f"{Path(source) / OFFSET_FILE}: its coordinate tokens have other ids than the model's tokenizer gives; it "
            "belongs to another vocabulary."
        )
    for key, table_KH in offset.tables.items():
        table_KH.copy_(saved.tables[key])


def attach_saved_offset(model: PreTrainedModel, checkpoint: str | Path) -> OffsetAdapter | None:
    """Give `model` the adapter that a checkpoint folder holds; None, and nothing done, when it holds none."""
    saved = read_coord_offset(checkpoint)
    if saved is None:
        return None
    offset = attach_coord_offset(model, saved.coord_ids_K.tolist(), tie_head=saved.tie_head)
    restore_coord_offset(offset, saved, source=checkpoint)
    return offset


def _shapes(tables: Mapping[str, Tensor]) -> dict[str, list[int]]:
    return {key: list(table.shape) for key, table in tables.items()}


# --- folding ---


def fold_module(module: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Parameters of the plain module that computes what `module` does, for a walk over modules.

    Arguments:
        tensors: the parameters of `module` itself, gathered, by name; returned as they are if it is no part of the
            adapter.
    """
    plain = dict(tensors)
    table_KH = plain.pop(TABLE, None)
    if table_KH is not None and isinstance(module, OffsetEmbedding | OffsetLinear):
        plain["weight"] = fold_rows(plain["weight"], table_KH, module.coord_ids_K)
    return plain


@torch.no_grad()
def fold_rows(weight_VH: Tensor, table_KH: Tensor, coord_ids_K: Tensor) -> Tensor:
    """A copy of the weight whose rows `coord_ids_K` have the table added, rounded once."""
    ids_K = coord_ids_K.to(weight_VH.device)
    rows_KH = weight_VH[ids_K] + table_KH.to(weight_VH.device)
    return weight_VH.detach().index_copy(0, ids_K, rows_KH.to(weight_VH.dtype))


@torch.no_grad()
def fold_coord_offset(model: PreTrainedModel) -> None:
    """Turn `model` back into a plain one, in place: the tables go into the weights.

    With a head table of its own on a tied model, `lm_head` gets a weight of its own and the configuration says so.
    """
    offset = coord_offset_of(model)
    if offset is None:
        return
    embedding, head = offset
    unties, one_weight = offset.unties, embedding.weight is head.weight
    plain_embedding = nn.Embedding(
        embedding.num_embeddings, embedding.embedding_dim, embedding.padding_idx, device="meta"
    )
    plain_head = nn.Linear(head.in_features, head.out_features, bias=head.bias is not None, device="meta")
    ids_K = embedding.coord_ids_K
    plain_embedding.weight = _parameter(embedding.weight, embedding.coord_offset_KH, ids_K)
    plain_head.weight = (
        plain_embedding.weight
        if one_weight and not unties
        else _parameter(head.weight, head.coord_offset_KH, ids_K)
    )
    plain_head.bias = head.bias
    model.set_input_embeddings(plain_embedding.train(embedding.training))
    model.set_output_embeddings(plain_head.train(head.training))
    if unties:
        untie_config(model)


def untie_config(model: PreTrainedModel) -> None:
    """Let the configuration say that embedding and head are two matrices; engines look at the text model's part."""
    for config in {id(c): c for c in (model.config, model.config.get_text_config())}.values():
        config.tie_word_embeddings = False


def _parameter(weight_VH: Tensor, table_KH: Tensor, ids_K: Tensor) -> nn.Parameter:
    return nn.Parameter(fold_rows(weight_VH, table_KH, ids_K), requires_grad=weight_VH.requires_grad)

"""Token accuracy, token types and coordinate mass of a forward again, in float64."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from coordexp.audit.rows64 import Rows, Sums
from coordexp.codec.token_types import TokenType
from coordexp.metrics import keys_tokens

ACC = {
    "desc": keys_tokens.DESC_TOKEN_ACC,
    "format": keys_tokens.FORMAT_TOKEN_ACC,
    "coord": keys_tokens.COORD_TOKEN_ACC,
}
TOP5 = {
    "desc": keys_tokens.DESC_TOKEN_ACC_TOP5,
    "format": keys_tokens.FORMAT_TOKEN_ACC_TOP5,
    "coord": keys_tokens.COORD_TOKEN_ACC_TOP5,
}
FRAC = {
    "desc": keys_tokens.DESC_TOKEN_FRAC,
    "format": keys_tokens.FORMAT_TOKEN_FRAC,
    "coord": keys_tokens.COORD_TOKEN_FRAC,
}
TO_COORD = {
    "text": keys_tokens.FLIP_TEXT_TO_COORD,
    "format": keys_tokens.FLIP_FORMAT_TO_COORD,
    "desc": keys_tokens.FLIP_DESC_TO_COORD,
}
MASS = {
    "coord": keys_tokens.COORD_VOCAB_MASS_AT_GT_COORD,
    "text": keys_tokens.COORD_VOCAB_MASS_AT_GT_TEXT,
    "format": keys_tokens.COORD_VOCAB_MASS_AT_GT_FORMAT,
    "desc": keys_tokens.COORD_VOCAB_MASS_AT_GT_DESC,
}


def token_equations(sums: Sums, rows: Rows, settings: Mapping[str, Any]) -> None:
    """Accuracy of all rows; by token type, and probability in the wrong vocabulary, where rows have types."""
    predicted_R = rows.logits_RV.argmax(-1)
    hits_R = (predicted_R == rows.targets_R).double()
    sums.add(keys_tokens.TOKEN_ACC, hits_R.sum(), hits_R.numel())
    types_R = rows.raw["types_R"]
    if types_R is None:
        return
    has_tokens = rows.ids_K.numel() > 0  # else answers write numbers
    if rows.num_text and has_tokens:
        sums.add(keys_tokens.TEXT_TOKEN_ACC, hits_R[: rows.num_text].sum(), rows.num_text)
    desc, coord = types_R == TokenType.DESC, types_R == TokenType.COORD
    formats = (types_R == TokenType.STRUCT) | (types_R == TokenType.EOS)
    groups = {"desc": desc, "format": formats, "coord": coord, "text": desc | formats}
    num_included = (groups["text"] | coord).sum()

    def split(names: Mapping[str, str], values_R: Tensor) -> None:
        for name, key in names.items():
            sums.add(key, (values_R * groups[name]).sum(), groups[name].sum())

    split(ACC if has_tokens else ACC | {"text": keys_tokens.TEXT_TOKEN_ACC}, hits_R)
    for name, key in FRAC.items():
        sums.add(key, groups[name].sum(), num_included)
    if has_tokens:
        is_coord_R = torch.isin(predicted_R, rows.ids_K).double()
        split(TO_COORD, is_coord_R)
        split({"coord": keys_tokens.FLIP_COORD_TO_NONCOORD}, 1 - is_coord_R)
    if settings["log_top5"]:
        at_target = rows.logits_RV.gather(1, rows.targets_R[:, None])
        top5_R = (rows.logits_RV > at_target).sum(-1).lt(5).double()
        sums.add(keys_tokens.TOKEN_ACC_TOP5, top5_R.sum(), top5_R.numel())
        split(TOP5, top5_R)
    if settings["coord_monitor_mass"] and has_tokens:
        taken_R = _taken(hits_R.numel(), settings["coord_monitor_mass_max_tokens"])
        mass_R = rows.logits_RV.softmax(-1)[:, rows.ids_K].sum(-1) * taken_R
        for name, key in MASS.items():
            sums.add(key, (mass_R * groups[name]).sum(), (taken_R * groups[name]).sum())


def _taken(num_rows: int, most: int) -> Tensor:
    """1 for the `most` rows whose multiples of the golden ratio have the smallest fractional parts; 0: all rows."""
    if not most or num_rows <= most:
        return torch.ones(num_rows, dtype=torch.float64)
    fractions = torch.arange(num_rows, dtype=torch.float64) * ((5**0.5 - 1) / 2) % 1
    taken_R = torch.zeros(num_rows, dtype=torch.float64)
    taken_R[fractions.argsort()[:most]] = 1.0
    return taken_R

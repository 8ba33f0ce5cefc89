"""Cross-entropy weight of every text token, by what the token is and which forward it is in."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from coordexp.errors import ContractError
from coordexp.losses.inputs import SupervisedRows, TextRole
from coordexp.losses.modules import TokenCE
from coordexp.losses.provenance import Forward


@dataclass(frozen=True)
class TextWeights:
    """How each text row takes part in a forward."""

    ce_R: Tensor
    """float [num_text]: weight w_t of the row's cross-entropy."""
    is_desc_R: Tensor
    """bool [num_text]: counts as `desc_ce`, otherwise as `struct_ce`."""
    gated_R: Tensor
    """bool [num_text]: the text gate acts on it."""


class TextWeighting:
    """`token_ce` settings -> weights.

    | role           | A1              | A2 | B                                          |
    |----------------|-----------------|----|--------------------------------------------|
    | STRUCT         | 1               | 1  | 1, or the drop-invalid multiplier          |
    | DESC           | desc_ce_weight  | 0  | rollout_fn_desc_weight                     |
    | MATCHED_STRUCT | 0               | 0  | rollout_matched_prefix_struct_weight       |
    | CLOSE, EOS     | 1               | 1  | 1                                          |

    (The scale self_context_struct_ce_weight of A2 is on the whole atom: inside a weighted mean it would
    cancel.) The text gate acts on rows with a positive weight except EOS and, in channel A, DESC.
    """

    def __init__(self, config: TokenCE):
        self.config = config
        self._tables: dict[tuple[Forward, torch.device], Tensor] = {}

    def role_weight(self, forward: Forward, role: TextRole) -> float:
        """w_t of a role, before the drop-invalid multiplier."""
        if role in (TextRole.STRUCT, TextRole.CLOSE, TextRole.EOS):
            return 1.0
        if role is TextRole.MATCHED_STRUCT:
            in_rollout = forward is Forward.ROLLOUT
            return self.config.rollout_matched_prefix_struct_weight if in_rollout else 0.0
        if forward is Forward.ROLLOUT:
            return self.config.rollout_fn_desc_weight
        return 0.0 if forward is Forward.SELF_CONTEXT else self.config.desc_ce_weight

    def __call__(self, rows: SupervisedRows, forward: Forward) -> TextWeights:
        """Weights of the text rows, on their device. ContractError for rows without roles."""
        if rows.roles_R is None or rows.dropped_invalid_R is None:
            raise ContractError("stage-2 rows need a role each; build them with SupervisedRows.from_boxes")
        roles_R = rows.roles_R
        ce_R = self._table(forward, roles_R.device)[roles_R]
        if forward is Forward.ROLLOUT:
            boosted_R = rows.dropped_invalid_R & (roles_R == TextRole.STRUCT)
            multiplier = self.config.rollout_drop_invalid_struct_ce_multiplier
            ce_R = torch.where(boosted_R, ce_R * multiplier, ce_R)
        is_desc_R = roles_R == TextRole.DESC
        gated_R = (ce_R > 0) & (roles_R != TextRole.EOS)
        return TextWeights(ce_R, is_desc_R, gated_R & ~is_desc_R if forward.channel == "A" else gated_R)

    def _table(self, forward: Forward, device: torch.device) -> Tensor:
        """w_t by role, float32 [number of roles], copied to each device once."""
        if (forward, device) not in self._tables:
            weights = [self.role_weight(forward, role) for role in TextRole]
            self._tables[forward, device] = torch.tensor(weights, device=device)
        return self._tables[forward, device]

"""One chunk of logits that turns, in place, into the numbers of LossInputs and then into its gradient."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from coordexp.losses.columns import CoordColumns
from coordexp.losses.inputs import LossInputs, LossNeeds, SupervisedRows


class ChunkLogits:
    """The logits of some text rows, or of some coordinate rows, with V > K.

    Split each row into its K coordinate logits and the rest. A loss of LossInputs depends on the rest only
    through its log-sum-exp (one per temperature in use) and the target's logit. So the buffer can be
    overwritten by exp(rest), which is the gradient of that log-sum-exp up to a factor per row, and a small
    autograd graph over [r], [r] and [r, K] leaves does everything else.

    Arguments:
        logits_rV: float32 or float64 [r, V]; owned by this object from now on.
        rows: what the rows must predict; all text or all coordinate.
    """

    def __init__(self, logits_rV: Tensor, rows: SupervisedRows, columns: CoordColumns, needs: LossNeeds):
        self._rows, self._columns, self._needs, self._buffer_rV = rows, columns, needs, logits_rV
        is_text = rows.num_text > 0
        with_ce = is_text or needs.coord_ce
        with_odds = needs.text_odds if is_text else needs.coord_odds

        self._target_r = _leaf(logits_rV.gather(1, rows.targets_R.unsqueeze(1)).squeeze(1))
        self._coord_rK = _leaf(columns.take(logits_rV).clone())
        columns.fill_(logits_rV, -torch.inf)
        self._rest_max_r = logits_rV.amax(-1)
        self._row_max_r = self._rest_max_r
        if columns.num_bins:
            self._row_max_r = torch.maximum(self._rest_max_r, self._coord_rK.detach().amax(-1))

        temperatures = [1.0] * with_ce + [needs.temperature] * with_odds
        self._rest: dict[float, _RestOfRow] = {}
        for temperature in dict.fromkeys(temperatures):
            is_last = temperature == temperatures[-1]
            buffer_rV = logits_rV if is_last else logits_rV.clone()
            self._rest[temperature] = _RestOfRow(buffer_rV, self._rest_max_r, self._row_max_r, temperature)
        with torch.enable_grad():
            self.inputs = self._make_inputs(is_text, with_ce, with_odds)

    def gradient(self, loss: Tensor) -> Tensor:
        """d loss / d logits, [r, V], in the buffer the logits were in."""
        leaves = [self._coord_rK, self._target_r, *(rest.log_sum_r for rest in self._rest.values())]
        grad_coord_rK, grad_target_r, *grad_log_sums = gradients(loss, leaves)
        parts = [rest.gradient(g_r) for rest, g_r in zip(self._rest.values(), grad_log_sums, strict=True)]
        grad_rV = parts[-1] if parts else self._buffer_rV.zero_()
        for part_rV in parts[:-1]:
            grad_rV.add_(part_rV)
        self._columns.assign_(grad_rV, grad_coord_rK)
        return grad_rV.scatter_add_(1, self._rows.targets_R.unsqueeze(1), grad_target_r.unsqueeze(1))

    def _make_inputs(self, is_text: bool, with_ce: bool, with_odds: bool) -> LossInputs:
        ce_r = self._cross_entropy() if with_ce else None
        odds_r = self._log_odds() if with_odds else None
        nothing = self._target_r[:0]
        return LossInputs(
            rows=self._rows,
            needs=self._needs,
            text_ce_R=ce_r if is_text and ce_r is not None else nothing,
            text_log_odds_R=(odds_r if is_text else nothing) if self._needs.text_odds else None,
            coord_logits_NK=self._coord_rK[:0] if is_text else self._coord_rK,
            coord_log_odds_N=(nothing if is_text else odds_r) if self._needs.coord_odds else None,
            coord_ce_N=(nothing if is_text else ce_r) if self._needs.coord_ce else None,
        )

    def _log_sum_coord(self, temperature: float) -> Tensor:
        return ((self._coord_rK - self._row_max_r.unsqueeze(1)) / temperature).logsumexp(-1)

    def _cross_entropy(self) -> Tensor:
        log_sum_r = torch.logaddexp(self._rest[1.0].log_sum_r, self._log_sum_coord(1.0))
        return log_sum_r - (self._target_r - self._row_max_r)

    def _log_odds(self) -> Tensor:
        temperature = self._needs.temperature
        return self._log_sum_coord(temperature) - self._rest[temperature].log_sum_r


class _RestOfRow:
    """Log-sum-exp at one temperature of the columns that are no coordinate token (the others are -inf)."""

    def __init__(self, logits_rV: Tensor, rest_max_r: Tensor, row_max_r: Tensor, temperature: float):
        logits_rV.sub_(rest_max_r.unsqueeze(1))
        if temperature != 1.0:
            logits_rV.div_(temperature)
        self._exp_rV = logits_rV.exp_()
        self._sum_r = self._exp_rV.sum(-1)
        self._temperature = temperature
        self.log_sum_r = _leaf(self._sum_r.log() + (rest_max_r - row_max_r) / temperature)
        """[r]: relative to the row maximum divided by T."""

    def gradient(self, grad_log_sum_r: Tensor) -> Tensor:
        """d loss / d logits through `log_sum_r`, in the buffer."""
        return self._exp_rV.mul_((grad_log_sum_r / (self._sum_r * self._temperature)).unsqueeze(1))


def coord_only_inputs(coord_rK: Tensor, rows: SupervisedRows, needs: LossNeeds) -> LossInputs:
    """Inputs of coordinate rows when the objective needs only their K coordinate logits, a leaf."""
    nothing = coord_rK.new_zeros(0)
    return LossInputs(
        rows=rows,
        needs=needs,
        text_ce_R=nothing,
        text_log_odds_R=nothing if needs.text_odds else None,
        coord_logits_NK=_leaf(coord_rK),
        coord_log_odds_N=None,
        coord_ce_N=None,
    )


def text_only_inputs(
    ce_R: Tensor, rows: SupervisedRows, columns: CoordColumns, needs: LossNeeds
) -> LossInputs:
    """Inputs of text rows when the objective needs only their cross-entropies."""
    nothing = ce_R.new_zeros(0)
    return LossInputs(
        rows=rows,
        needs=needs,
        text_ce_R=ce_R,
        text_log_odds_R=None,
        coord_logits_NK=ce_R.new_zeros(0, columns.num_bins),
        coord_log_odds_N=nothing if needs.coord_odds else None,
        coord_ce_N=nothing if needs.coord_ce else None,
    )


def gradients(loss: Tensor, leaves: Sequence[Tensor]) -> list[Tensor]:
    """d loss / d leaf for every leaf; zeros where the loss does not depend on it."""
    if not loss.requires_grad:
        return [torch.zeros_like(leaf) for leaf in leaves]
    found = torch.autograd.grad(loss, leaves, allow_unused=True)
    return [torch.zeros_like(leaf) if g is None else g for leaf, g in zip(leaves, found, strict=True)]


def _leaf(values: Tensor) -> Tensor:
    return values.detach().requires_grad_()

"""The stage-1 objective and its numbers a second time, in float64, from their definitions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from coordexp.audit.rows64 import Rows, Sums, target_widths, with_weights
from coordexp.metrics import keys_stage1 as keys

MONITORS = ("acc_top5", "p_gt_mean", "margin_mean", "expected_bin_mae", "w1_to_delta")


class Stage1Equations:
    """Numbers and loss of the forwards of a step.

    Arguments:
        config: resolved_config.json.  sums, p90: what the numbers are added to.
        counted: dumped rows of all forwards that the losses are divided over.  step: of the run, 0 for the first.
        knobs: what controllers had in force.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        counted: Sequence[Mapping[str, Any]],
        sums: Sums,
        p90: dict[str, list[float]],
        step: int,
        knobs: Mapping[str, float],
    ) -> None:
        settings = config["custom"]["coord_soft_ce_w1"]
        self._settings = with_weights(settings, step, knobs, "coord_soft_ce_w1")
        self._has_gate = settings["gate_weight"] > 0 or settings["monitor_mass"]
        self._is_packed = bool(config["training"]["packing"])
        self._num_text = sum(int(rows["num_text"]) for rows in counted)
        self._num_coord = sum(int(rows["bins_N"].numel()) for rows in counted)
        self._sums, self._p90, self._step = sums, p90, step

    def add(self, rows: Rows, num_samples: int) -> Tensor:
        """Adds a forward; returns its share of the step's loss."""
        ce_R, num_text, num_coord = rows.ce_R, rows.num_text, rows.bins_N.numel()
        text = ce_R[:num_text].sum()
        self._sums.add(keys.PACK_NUM_SAMPLES, num_samples)
        self._sums.add(keys.BASE_CE_NONCOORD_TOKENS, num_text)
        self._sums.add(keys.BASE_CE_LOSS, text, num_text)
        weighted = self._coord(rows) if num_coord else text.new_zeros(())
        if self._is_packed:
            self._per_sample(text, num_text, weighted, num_coord, num_samples)
        if not self._settings["enabled"]:
            return ce_R.sum() / (self._num_text + self._num_coord)
        return text / max(1, self._num_text) + weighted / max(1, self._num_coord)

    def _coord(self, rows: Rows) -> Tensor:
        """Adds the coordinate rows; returns their weighted sum."""
        settings, num = self._settings, rows.bins_N.numel()
        sigma = target_widths(settings, self._step, rows.raw.get("sides_N"))
        terms = rows.terms(settings["temperature"], sigma, settings["target_truncate"])
        weighted_N = rows.logits_RV.new_zeros(num)
        for name in ("soft_ce", "w1", "ce", "gate"):
            weighted_N = weighted_N + settings[f"{name}_weight"] * terms[name]
        named = {"loss": weighted_N, **{name: terms[name] for name in ("soft_ce", "w1", "ce")}}
        named |= {"gate": terms["gate"]} if self._has_gate else {}
        for name, values_N in named.items():
            for area in ("coord_diag", "coord_softce_w1"):
                self._sums.add(f"{area}/{name}", values_N.sum(), num)
        for name in (*MONITORS, *(["coord_vocab_mass"] if self._has_gate else [])):
            self._sums.add(f"coord_diag/{name}", terms[name].sum(), num)
        self._sums.add(keys.COORD_DIAG_COORD_TOKENS, num)
        self._sums.add(keys.COORD_DIAG_ENABLED, float(settings["enabled"]))
        error_N = terms["expected_bin_mae"].detach()
        self._p90[keys.COORD_DIAG_EXPECTED_BIN_ABS_ERR_P90].append(float(error_N.quantile(0.9)))
        return weighted_N.sum()

    def _per_sample(
        self, text: Tensor, num_text: int, coord: Tensor, num_coord: int, num_samples: int
    ) -> None:
        """What packed runs say of one original sample."""
        totals: dict[str, Tensor | float] = {keys.STAGE1_TOTAL_LOSS_PER_SAMPLE_EST: text + coord}
        if self._num_text:
            totals |= {
                keys.BASE_CE_NONCOORD_TOKENS_PER_SAMPLE: num_text,
                keys.BASE_CE_LOSS_PER_SAMPLE: text,
            }
        if self._num_coord:
            totals |= {
                keys.COORD_DIAG_COORD_TOKENS_PER_SAMPLE: num_coord,
                keys.COORD_DIAG_LOSS_PER_SAMPLE: coord,
            }
        for key, total in totals.items():
            self._sums.add(key, total, num_samples)

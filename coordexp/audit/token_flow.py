"""Order and targets, read off the step plans of a real run: what reaches the device is what the file says.

A dumped forward is cut back into its samples; each is compared with its record, which is found by `FILE:LINE`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from coordexp.audit.findings import DifferenceError
from coordexp.audit.subject import ShortRun, Subject
from coordexp.codec.forms.base import AnswerForm
from coordexp.codec.records import Record, order_objects
from coordexp.data.source import source_of
from coordexp.losses.inputs import TextRole
from coordexp.losses.modules import ForwardKind
from coordexp.packing.position_ids import VisionLayout


@dataclass(frozen=True)
class SampleTokens:
    """One sample of a dumped forward.

    start: of its first token in the flattened batch.  patches: rows of `pixel_values` that are its own.
    """

    sample_id: str
    forward: dict[str, Any]
    where: str
    start: int
    ids_T: Tensor
    patches: slice

    @property
    def rows(self) -> tuple[Tensor, Tensor]:
        """Token positions within the sample that its supervised rows predict, and their targets; in order."""
        rows = self.forward["rows"]
        at = rows["positions_R"] + 1 - self.start
        own = (at > 0) & (at < self.ids_T.numel())
        order = at[own].argsort()
        return at[own][order], rows["targets_R"][own][order]

    @property
    def pixels_PD(self) -> Tensor | None:
        pixels = self.forward["inputs"].get("pixel_values")
        return None if pixels is None else pixels[self.patches]


def samples_of(run: ShortRun, layout: VisionLayout) -> Iterator[SampleTokens]:
    """Every sample of every counted forward of a run."""
    for plan in run.plans:
        is_rollout = plan["kinds"] == [ForwardKind.ROLLOUT.name]
        for index, forward in enumerate(plan["forwards"]):
            if not forward["is_filler"]:
                forward = {**forward, "is_rollout": is_rollout}
                where = f"step {plan['step']}, rank {plan['rank']}, forward {index}"
                yield from _cut(forward, where, layout)


def _cut(forward: dict[str, Any], where: str, layout: VisionLayout) -> Iterator[SampleTokens]:
    inputs = forward["inputs"]
    ids_BT = inputs["input_ids"]
    spans = _spans(inputs)
    if len(spans) != len(forward["sample_ids"]):
        raise DifferenceError(
            f"{where}: {len(spans)} samples lie in the batch, but {len(forward['sample_ids'])} are named"
        )
    grids = inputs.get("image_grid_thw")
    merged = layout.spatial_merge_size**2
    first_patch, next_image = 0, 0
    for sample_id, (start, stop) in zip(forward["sample_ids"], spans, strict=True):
        ids_T = ids_BT.flatten()[start:stop]
        num_pads = int((ids_T == layout.image_token_id).sum())
        num_patches = 0
        while grids is not None and num_patches < num_pads * merged:
            num_patches += int(grids[next_image].prod())
            next_image += 1
        if num_patches != num_pads * merged:
            raise DifferenceError(
                f"{where}, {sample_id}: {num_pads} image tokens stand for {num_pads * merged} patches, but its images "
                f"have {num_patches}"
            )
        patches = slice(first_patch, first_patch + num_patches)
        first_patch += num_patches
        yield SampleTokens(sample_id, forward, where, start, ids_T, patches)


def _spans(inputs: dict[str, Any]) -> list[tuple[int, int]]:
    """[start, stop) of each sample in the flattened batch: by the mask, or where text positions begin anew."""
    ids_BT = inputs["input_ids"]
    width = ids_BT.shape[1]
    mask = inputs.get("attention_mask")
    if mask is not None and mask.ndim == 2:
        starts = [(b * width + int(row.nonzero()[0]), int(row.sum())) for b, row in enumerate(mask)]
        return [(start, start + length) for start, length in starts]
    positions = inputs.get("text_position_ids")
    text_BT = inputs["position_ids"][0] if positions is None else positions
    begins = (text_BT.diff(dim=-1, prepend=text_BT[:, :1] - 2) != 1).flatten().nonzero().flatten().tolist()
    return list(zip(begins, [*begins[1:], ids_BT.numel()], strict=True))


def check_order(run: ShortRun, subject: Subject, layout: VisionLayout) -> str:
    """Every record is trained on as often as every other, and the ids are those of the file."""
    counts = Counter(sample.sample_id for sample in samples_of(run, layout))
    known = set(by_id(subject.records))
    strangers = sorted(counts.keys() - known)
    if strangers:
        raise DifferenceError(f"{strangers[0]} is trained on, but is no line of {subject.data.name}")
    per_epoch = sum(counts.values()) / len(known)
    most = int(np.ceil(per_epoch))
    repeated = [sample_id for sample_id, count in counts.items() if count > most]
    if repeated:
        raise DifferenceError(
            f"{repeated[0]} is trained on {counts[repeated[0]]} times in {per_epoch:.2g} epochs"
        )
    missed = sorted(known - counts.keys())
    if missed and per_epoch >= 1:
        raise DifferenceError(f"{missed[0]} is never trained on in {per_epoch:.2g} epochs")
    return f"{sum(counts.values())} samples of {len(counts)} records on {run.num_ranks} rank(s)"


def check_targets(run: ShortRun, subject: Subject, layout: VisionLayout) -> str:
    """Rows point at the next token, coordinate rows at their bins, and what is supervised is the record's answer."""
    records, num_rows, num_slots = by_id(subject.records), 0, 0
    for sample in samples_of(run, layout):
        at, targets = sample.rows
        is_rollout = sample.forward["is_rollout"]
        corrected = _are_slots(sample, at) | _are_names(sample, at)
        wrong = (sample.ids_T[at] != targets) & ~(corrected & is_rollout)
        wrong = wrong.nonzero().flatten()
        if wrong.numel():
            t = int(at[wrong[0]])
            raise DifferenceError(
                f"{sample.where}, {sample.sample_id}: row {t - 1} is taught token {int(targets[wrong[0]])}, but the "
                f"token after it is {int(sample.ids_T[t])}"
            )
        num_rows += at.numel()
        num_slots += _check_bins(sample, at, subject)
        if is_rollout:
            _check_taught_names(sample, records[sample.sample_id], run.form, subject)
        else:
            _check_text(sample, records[sample.sample_id], at, subject, run)
    return f"{num_rows} rows, {num_slots} coordinate slots"


def _check_bins(sample: SampleTokens, at: Tensor, subject: Subject) -> int:
    """A coordinate row's bin is the one its target token is named after."""
    rows = sample.forward["rows"]
    slots = rows["positions_R"][rows["num_text"] :] + 1 - sample.start
    own = torch.isin(slots, at)
    targets_N, bins_N = rows["targets_R"][rows["num_text"] :][own], rows["bins_N"][own]
    ids = torch.tensor([subject.tokenizer.convert_tokens_to_ids(f"<|coord_{k}|>") for k in bins_N.tolist()])
    wrong = (ids != targets_N).nonzero().flatten()
    if wrong.numel():
        n = int(wrong[0])
        name = subject.tokenizer.convert_ids_to_tokens(int(targets_N[n]))
        raise DifferenceError(
            f"{sample.where}, {sample.sample_id}: the slot of {name} is taught bin {int(bins_N[n])}"
        )
    return int(bins_N.numel())


def _check_text(sample: SampleTokens, record: Record, at: Tensor, subject: Subject, run: ShortRun) -> None:
    custom = run.config["custom"]
    if custom["object_ordering"] != "sorted" or custom.get("augmentation"):
        expected = sorted(obj.desc for obj in record.objects)
        return _check_names(sample, expected, at, subject, run.form)
    objects = order_objects(record.objects, "sorted")
    expected_text = run.form.serialize(objects) + "<|im_end|>"
    text = subject.tokenizer.decode(sample.ids_T[at])
    if text != expected_text:
        n = next((i for i, (a, b) in enumerate(zip(text, expected_text, strict=False)) if a != b), 0)
        raise DifferenceError(
            f"{sample.where}, {sample.sample_id}: taught …{text[max(0, n - 20) : n + 40]!r}, but the record says "
            f"…{expected_text[max(0, n - 20) : n + 40]!r}"
        )


def _check_names(
    sample: SampleTokens, expected: Sequence[str], at: Tensor, subject: Subject, form: AnswerForm
) -> None:
    parsed = form.parse(sample.ids_T[at].tolist(), subject.tokenizer)
    names = sorted(obj.desc for obj in parsed.objects)
    if not set(names) <= set(expected):
        raise DifferenceError(
            f"{sample.where}, {sample.sample_id}: taught the names {names}, the record has {expected}"
        )


def _are_slots(sample: SampleTokens, at: Tensor) -> Tensor:
    """Which positions are coordinate slots: in a matched prediction the target is the truth, not the token."""
    rows = sample.forward["rows"]
    slots = rows["positions_R"][rows["num_text"] :] + 1 - sample.start
    return torch.isin(at, slots)


def _are_names(sample: SampleTokens, at: Tensor) -> Tensor:
    """Which positions are of names of matched predictions: the target may be the true name's token."""
    return torch.isin(at, _name_rows(sample)[0])


def _name_rows(sample: SampleTokens) -> tuple[Tensor, Tensor]:
    """Token positions of taught names of matched predictions within the sample, ascending, and their targets."""
    rows = sample.forward["rows"]
    if rows["roles_R"] is None:
        return torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int64)
    at = rows["positions_R"][: rows["num_text"]] + 1 - sample.start
    own = (rows["roles_R"] == TextRole.MATCHED_DESC) & (at > 0) & (at < sample.ids_T.numel())
    order = at[own].argsort()
    return at[own][order], rows["targets_R"][: rows["num_text"]][own][order]


def _check_taught_names(sample: SampleTokens, record: Record, form: AnswerForm, subject: Subject) -> None:
    """Where a name is corrected, what was written of it goes on with the true token as a name of the record does."""
    at, targets = _name_rows(sample)
    written, start = form.serialize(record.objects), 0
    for index, (t, target) in enumerate(zip(at.tolist(), targets.tolist(), strict=True)):
        start = start if index and t == int(at[index - 1]) + 1 else t
        if int(sample.ids_T[t]) == target:
            continue
        taught = subject.tokenizer.decode([*sample.ids_T[start:t].tolist(), target])
        if taught not in written:
            raise DifferenceError(
                f"{sample.where}, {sample.sample_id}: a matched name is taught to go on as {taught!r}, but no name of "
                "the record does"
            )


def by_id(records: Sequence[Record]) -> dict[str, Record]:
    """Records by the id that training gives them."""
    return {source_of(record).sample_id: record for record in records}

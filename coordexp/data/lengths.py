"""How many tokens every sample of a data set has, told without reading its pictures.

    check_lengths(rows, template)        # before training: whatever is longer than max_length, by file and line
    lengths = sample_lengths(rows, template)

`check_lengths` counts only the samples whose bytes leave a doubt. Lengths of all samples are counted once, with all
cores, and kept on disk beside the checked records; other processes map them.
"""

from __future__ import annotations

import hashlib
import logging
import multiprocessing
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
from datasets import Dataset

from coordexp.codec.forms.choose import FORMS, form_of
from coordexp.data.dataset import RECORD_COLUMN, record_in
from coordexp.data.source import SampleSource, naming_sample
from coordexp.data.store.check import usable_cores
from coordexp.data.store.columns import record_from_text
from coordexp.data.store.locks import one_at_a_time
from coordexp.data.store.place import cache_folder
from coordexp.errors import RecordError
from coordexp.eval.predictions.answer_limit import CANDIDATES, limit_for
from coordexp.files import atomic_file
from coordexp.image_size import PixelLimits
from coordexp.swift_bridge.lengths import LengthRule, without_limit
from coordexp.swift_bridge.prompts import encode_sample

logger = logging.getLogger(__name__)

Count = Callable[[Sequence[int]], list[int]]
Lengths = npt.NDArray[np.int32]

_MAX_LENGTH = "global_max_length (max_length in ms-swift's flat form)"
SHOWN = 5
"""Samples that are named when some are too long."""
_CHUNK = 512
_MEASURED = "lengths"
"""Where ms-swift puts the lengths of samples that it has encoded (`lazy_tokenize: false`)."""
_BYTES_PER_OBJECT = max(form_of(name).most_bytes_per_object for name in FORMS)
_TOKENS_PER_COORD = max(form_of(name).most_tokens_per_coord for name in FORMS)
_CONTAINER_BYTES = max(len(form.opening + form.closing) for form in map(form_of, FORMS))


def check_lengths(
    rows: Dataset, template: Any, *, packing_length: int | None = None, largest_scale: float = 1.0
) -> None:
    """No sample, prompt and ground truth together, is longer than the template's max_length.

    rows: of `data.dataset.RowMaker`.  template: ms-swift's, in train mode.
    packing_length: of stage 2; no sample is longer than that either.
    largest_scale: factor by which pictures may grow in training.
    Raises RecordError naming the first few that are longer, and what to change.
    """
    limits = {_MAX_LENGTH: template.max_length, "rollout_matching.packing_length": packing_length}
    limits = {name: length for name, length in limits.items() if length}
    limit = min(limits.values(), default=None)
    too_long = {} if limit is None else longer_than(rows, template, limit, largest_scale)
    if not too_long:
        return
    most = max(too_long.values())
    named = "; ".join(_described(rows[index], length) for index, length in list(too_long.items())[:SHOWN])
    more = f" and {len(too_long) - SHOWN} more" if len(too_long) > SHOWN else ""
    to_raise = " and ".join(name for name, length in limits.items() if length < most)
    cap = _cap(rows, too_long, int(limit or 0), template.pixel_limits)
    fits = "" if cap is None else f" With max_pixels of {cap} or less all of them fit."
    raise RecordError(
        f"{len(too_long)} of {len(rows)} samples are longer than {limit} tokens: {named}{more}. Raise {to_raise} to "
        f"{most}, or give these records fewer objects or smaller pictures.{fits}"
    )


def _cap(rows: Dataset, too_long: Mapping[int, int], limit: int, limits: PixelLimits) -> int | None:
    """The largest max_pixels by which these samples become no longer than `limit`; None where none does."""
    caps = []
    for index, length in too_long.items():
        record = record_in(rows[index])
        excess = length - limit
        left = limits.num_tokens(record.width, record.height) - excess if len(record.images) == 1 else 0
        caps.append(limits.cap_for(left) or 0)
    return min(caps) or None


def longer_than(rows: Dataset, template: Any, limit: int, largest_scale: float = 1.0) -> dict[int, int]:
    """Index -> tokens of the samples that have more than `limit`; only those in doubt are counted.

    largest_scale: factor on both sides of every picture.
    """
    if _MEASURED in rows.column_names:
        measured = enumerate(_measured(rows).tolist())
        return {index: length for index, length in measured if length > limit}
    rule = _rule(rows, template)
    doubtful: Sequence[int] = range(len(rows))
    if rule is not None:
        rule = replace(rule, scale=largest_scale)
        doubtful = np.flatnonzero(most_tokens(rows, rule) > limit).tolist()
    lengths = _count(rows, doubtful, rule, template)
    return {index: length for index, length in zip(doubtful, lengths.tolist(), strict=True) if length > limit}


def sample_lengths(rows: Dataset, template: Any) -> Lengths:
    """int32 [N]: tokens of every sample; mapped from the disk after the first time."""
    if _MEASURED in rows.column_names:
        return _measured(rows)
    rule = _rule(rows, template)
    if rule is None:
        return _count(rows, range(len(rows)), None, template)
    key = hashlib.sha256(f"{rows._fingerprint} {rule.fingerprint}".encode()).hexdigest()[:24]
    path = cache_folder() / "lengths" / f"{key}.npy"
    if not path.is_file():
        with one_at_a_time(path.with_suffix(".lock"), f"lengths of {len(rows)} samples"):
            if not path.is_file():
                lengths = _count(rows, range(len(rows)), rule, template)
                with atomic_file(path, "wb") as stream:
                    np.save(stream, lengths)
    mapped: Lengths = np.load(path, mmap_mode="r")
    return mapped


def most_tokens(rows: Dataset, rule: LengthRule) -> npt.NDArray[np.int64]:
    """int64 [N]: no sample has more tokens than this. A token is a byte at least, a coordinate token is one.

    Of whichever form the answers have."""
    columns = rows.with_format("arrow")
    width, height = (columns[name][:].to_numpy() for name in ("width", "height"))
    sizes, which = np.unique(np.stack([width, height], axis=1), axis=0, return_inverse=True)
    pictures = np.array([_picture_tokens(rule, int(w), int(h)) for w, h in sizes], dtype=np.int64)
    question = rule.rest + rule.longest_text + columns["class_bytes"][:].to_numpy().astype(np.int64)
    most: npt.NDArray[np.int64] = question + pictures[which.ravel()] + _most_answer_tokens(rows)
    return most


def _most_answer_tokens(rows: Dataset) -> npt.NDArray[np.int64]:
    """int64 [N]: no ground truth has more tokens than this."""
    columns = rows.with_format("arrow")
    num_coords, desc_bytes = (columns[name][:].to_numpy() for name in ("num_coords", "desc_bytes"))
    num_objects = columns["is_poly"][:].combine_chunks().value_lengths().to_numpy()
    most: npt.NDArray[np.int64] = (
        _CONTAINER_BYTES
        + _BYTES_PER_OBJECT * num_objects.astype(np.int64)
        + _TOKENS_PER_COORD * num_coords.astype(np.int64)
        + desc_bytes
    )
    return most


def warn_of_short_answers(rows: Dataset, tokenizer: Any, max_new_tokens: int) -> None:
    """Say so when the longest ground truth is longer than an answer may be. rows: of `data.dataset.RowMaker`."""
    most = _most_answer_tokens(rows)
    doubtful = np.flatnonzero(most > max_new_tokens)
    if not len(doubtful):
        return
    order = np.argsort(most[doubtful], kind="stable")[::-1]
    lengths = {
        index: len(tokenizer.encode(rows[index]["messages"][-1]["content"], add_special_tokens=False)) + 1
        for index in doubtful[order[:CANDIDATES]].tolist()
    }
    index, length = max(lengths.items(), key=lambda item: item[1])
    if length > max_new_tokens:
        row = rows[index]
        logger.warning(
            "The ground truth of %s has %d objects in %d tokens, but rollout_matching.max_new_tokens is %d: answers to "
            "such pictures are always cut. %d lets them end.",
            SampleSource.of_sample(row).sample_id, len(record_in(row).objects), length, max_new_tokens,
            limit_for(length),
        )  # fmt: skip


def _measured(rows: Dataset) -> Lengths:
    lengths = rows.with_format(None)[_MEASURED][:]
    return np.array([sum(parts) if isinstance(parts, list) else parts for parts in lengths], dtype=np.int32)


def _picture_tokens(rule: LengthRule, width: int, height: int) -> int:
    try:
        return rule.picture_tokens(width, height)
    except RecordError:  # a shape that the model does not take: found, and named, when the sample is encoded
        return 0


def _rule(rows: Dataset, template: Any) -> LengthRule | None:
    """The rule for the samples, checked on a few of them."""
    shown = [rows[index] for index in sorted({0, len(rows) // 2, len(rows) - 1})]
    if any(len(row["images"]) != 1 for row in shown):
        return None
    records = map(record_in, shown)
    rule = LengthRule.of(template, shown, [(record.width, record.height) for record in records])
    if rule is None:
        logger.warning(
            "lengths of samples do not add up under this template; all of them are encoded once instead"
        )
    return rule


def _count(rows: Dataset, indices: Sequence[int], rule: LengthRule | None, template: Any) -> Lengths:
    """int32: tokens of the samples with these indices."""
    count: Count = partial(_whole, rows, template) if rule is None else partial(_told, rows, rule)
    parts = [indices[start : start + _CHUNK] for start in range(0, len(indices), _CHUNK)]
    workers = min(usable_cores(), len(parts))
    if workers <= 1:
        counted = [count(part) for part in parts]
    else:
        context = multiprocessing.get_context("fork")
        # Handed over by the fork itself: a tokenizer takes long to be sent.
        with ProcessPoolExecutor(workers, context, _keep, (count,)) as executor:
            counted = list(executor.map(_use_kept, parts))
    return np.array([length for part in counted for length in part], dtype=np.int32)


_kept: list[Count] = []


def _keep(count: Count) -> None:
    _kept.append(count)


def _use_kept(indices: Sequence[int]) -> list[int]:
    return _kept[-1](indices)


def _told(rows: Dataset, rule: LengthRule, indices: Sequence[int]) -> list[int]:
    batch = rows.select(indices)[:]
    answers = rule.answer_tokens([messages[-1]["content"] for messages in batch["messages"]])
    questions = rule.question_tokens(batch["messages"])
    records = map(record_from_text, batch[RECORD_COLUMN])
    return [
        rule.rest + question + _picture_tokens(rule, record.width, record.height) + answer
        for question, record, answer in zip(questions, records, answers, strict=True)
    ]


def _whole(rows: Dataset, template: Any, indices: Sequence[int]) -> list[int]:
    lengths = []
    with without_limit(template):
        for index in indices:
            row = rows[index]
            with naming_sample(row):
                lengths.append(encode_sample(template, row)["length"])
    return lengths


def _described(row: Mapping[str, Any], length: int) -> str:
    record = record_in(row)
    return (
        f"{SampleSource.of_sample(row).sample_id} has {length} ({len(record.objects)} objects, a picture of "
        f"{record.width} x {record.height})"
    )

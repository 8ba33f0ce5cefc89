"""Every number of a step's rollouts again, from the answers, matches and targets that its dump holds."""

from __future__ import annotations

import math
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from coordexp.audit.rewrite_equations import box_iou, box_of, rewrite_equations
from coordexp.audit.run_equations import DumpedStep, counted
from coordexp.codec.schema import DropReason
from coordexp.codec.token_types import TokenType
from coordexp.metrics import keys_rollout as keys
from coordexp.metrics import keys_stage2 as stage2
from coordexp.targets.roles import TokenRole

Answer = Mapping[str, Any]
WINDOW = 200
"""Steps that `stage2_ab/b_ratio_realized` looks back on."""
REPEATED = 0.9
"""IoU above which an object of the same name is the same again."""
TAIL = (TokenRole.FN_TAIL, TokenRole.CLOSURE, TokenRole.EOS)


def rollout_equations(step: DumpedStep) -> dict[str, float]:
    """Numbers of schedule, rollouts, packs and times; ratios over nothing are absent."""
    values = _schedule(step)
    answers = [answer for plan in step.plans for answer in plan["answers"]]
    if not answers:
        return values
    settings = step.config["rollout_matching"]
    ratios = _ratios(answers, step)
    values |= {key: over / under for key, (over, under) in ratios.items() if under}
    values |= rewrite_equations(answers, settings["targets"])
    values |= _oracle(step.plans, settings["num_return_sequences"])
    values |= _counts(answers) | _knobs(settings, len(answers)) | _drops(answers)
    return values | _percentiles(step) | _times(step) | _descriptions(step) | _packs(step)


def _schedule(step: DumpedStep) -> dict[str, float]:
    section = step.config.get("stage2_ab")
    if not section:
        return {}
    ratio, now = section["schedule"]["b_ratio"], step.step
    last = range(max(0, now + 1 - WINDOW), now + 1)
    if isinstance(ratio, list):
        steps, shares = zip(*ratio, strict=True)
        of_steps = np.interp(np.arange(now + 1), steps, shares)
        sums = [math.fsum(of_steps[:s]) for s in range(now + 2)]
    else:
        sums = [s * ratio for s in range(now + 2)]
    if "b_ratio" in step.plans[0].get("knobs", {}):  # a controller's: what the steps of its run were
        ran = [plan["channel"] == "B" for plan in step.history if plan["rank"] == step.plans[0]["rank"]][
            -WINDOW:
        ]
        return {
            stage2.STAGE2_CHANNEL_B: float(step.channel == "B"),
            stage2.B_RATIO_REALIZED: sum(ran) / len(ran),
        }
    is_b = [math.floor(sums[s + 1]) > math.floor(sums[s]) for s in last]
    return {
        stage2.STAGE2_CHANNEL_B: float(step.channel == "B"),
        stage2.B_RATIO_REALIZED: sum(is_b) / len(is_b),
    }


def _total(answers: Sequence[Answer], number: Callable[[Answer], float]) -> float:
    return float(sum(map(number, answers)))


def _num_dropped(answer: Answer) -> int:
    """Dropped records, ambiguous ones included."""
    return sum(answer["dropped_by_reason"].values())


def _num_ambiguous(answer: Answer) -> int:
    return int(answer["dropped_by_reason"].get(DropReason.AMBIGUOUS.value, 0))


def _num_taught(answer: Answer) -> int:
    """Matched predictions that the target supervises: none without a target, or with a prefix that is not its own."""
    return 0 if answer["target"] is None else int(answer["target"]["num_matched"])


def _built(answers: Sequence[Answer]) -> list[Answer]:
    return [answer for answer in answers if answer["target"] is not None]


def _counts(answers: Sequence[Answer]) -> dict[str, float]:
    gt, taught = _total(answers, lambda a: a["num_gt"]), _total(answers, _num_taught)
    matched = _total(answers, lambda a: len(a["matched"]))
    pred = _total(answers, lambda a: len(a["descs"]))
    dropped, ambiguous = _total(answers, _num_dropped), _total(answers, _num_ambiguous)
    built = _built(answers)
    return {
        stage2.STAGE2_RAW_ROLLOUTS: float(len(answers)),
        keys.GEN_NEW_TOKENS_TOTAL: _total(answers, lambda a: a["num_tokens"]),
        keys.REPEAT_TERMINATE_TRIGGERED: _total(answers, lambda a: a["repeat_terminated"]),
        keys.GT_OBJECTS_TOTAL: gt,
        keys.VALID_PRED_OBJECTS_TOTAL: pred,
        keys.MATCHED_FOR_SUPERVISION: taught,
        keys.EXCLUDED_FROM_SUPERVISION: matched - taught,
        keys.FN_TOTAL: gt - taught,
        keys.FN_APPENDED_TOTAL: _total(built, lambda a: a["num_gt"] - _num_taught(a)),
        keys.GATING_REJECTIONS: _total(answers, lambda a: a["gating_rejections"]),
        keys.MATCHED_MASKIOU_COUNT: matched,
        keys.PARSE_DROPPED_INVALID: dropped - ambiguous,
        keys.PARSE_DROPPED_AMBIGUOUS: ambiguous,
        keys.PARSE_TRUNCATED: _total(answers, lambda a: a["truncated"]),
        keys.PARSE_OBJ_TOTAL: pred + dropped,
        keys.PREFIX_COORD_TARGETS_TOTAL: _total(built, _num_prefix_slots),
    }


def _oracle(plans: Sequence[Mapping[str, Any]], num_answers: int) -> dict[str, float]:
    """Objects that any answer to their question found; ranks hold whole questions."""
    found = asked = 0
    for plan in plans if num_answers > 1 else ():
        for index, answer in enumerate(plan["answers"]):
            if index % num_answers == 0:
                together = plan["answers"][index : index + num_answers]
                by_any = [{gt for _, gt in one["matched"]} for one in together]
                found += sum(any(gt in gts for gts in by_any) for gt in range(answer["num_gt"]))
                asked += answer["num_gt"]
    return {keys.ORACLE_RECALL: found / asked} if asked else {}


def _ratios(answers: Sequence[Answer], step: DumpedStep) -> dict[str, tuple[float, float]]:
    num, built = float(len(answers)), _built(answers)
    counts = _counts(answers)
    tokens, gt, pred = (
        counts[key]
        for key in (keys.GEN_NEW_TOKENS_TOTAL, keys.GT_OBJECTS_TOTAL, keys.VALID_PRED_OBJECTS_TOTAL)
    )
    taught, matched = counts[keys.MATCHED_FOR_SUPERVISION], counts[keys.MATCHED_MASKIOU_COUNT]
    started, seconds = counts[keys.PARSE_OBJ_TOTAL], sum(plan["seconds"]["generate"] for plan in step.plans)
    ratios = {
        keys.GEN_NEW_TOKENS_MEAN: (tokens, num),
        keys.GEN_TOKENS_PER_S: (tokens, seconds),
        keys.PRECISION: (taught, pred),
        keys.RECALL: (taught, gt),
        keys.F1: (2 * taught, pred + gt),
        keys.EXCLUDED_RATE: (matched - taught, matched),
        keys.GATING_REJECTION_RATE: (
            counts[keys.GATING_REJECTIONS],
            _total(answers, lambda a: a["num_candidates"]),
        ),
        keys.MATCHED_MASKIOU_MEAN: (_total(answers, lambda a: math.fsum(a["maskious"])), matched),
        keys.PARSE_TRUNCATED_RATE: (counts[keys.PARSE_TRUNCATED], num),
        keys.PARSE_OBJ_VALID_FRAC: (pred, started),
        keys.PARSE_OBJ_DROP_FRAC: (started - pred, started),
        keys.SAMPLE_VALID_PRED_RATE: (_total(answers, lambda a: bool(a["descs"])), num),
        keys.SAMPLE_ANY_MATCH_RATE: (_total(answers, lambda a: _num_taught(a) > 0), num),
        keys.DUPLICATE_RATE_MEAN: (_total(answers, _share_repeated), num),
        keys.PREFIX_COORD_TARGETS_PER_MATCHED: (
            counts[keys.PREFIX_COORD_TARGETS_TOTAL],
            _total(built, _num_taught),
        ),
        keys.TAIL_IGNORE_FRAC: (_num_masked(built, step.config), _total(built, _tail_length)),
    }
    for mean, _, lengths_of in LENGTHS:
        lengths = list(lengths_of(answers))
        ratios[mean] = (float(sum(lengths)), float(len(lengths)))
    return ratios


LENGTHS: tuple[tuple[str, str, Callable[[Sequence[Answer]], Iterable[int]]], ...] = (
    (keys.PROMPT_LEN_MEAN, keys.PROMPT_LEN_P90, lambda some: (len(a["prompt_token_ids"]) for a in some)),
    (keys.ROLLOUT_LEN_MEAN, keys.ROLLOUT_LEN_P90, lambda some: (a["num_tokens"] for a in some)),
    (
        keys.TRAIN_LEN_MEAN,
        keys.TRAIN_LEN_P90,
        lambda some: (len(_roles(a)) - a["target"]["prompt_length"] for a in _built(some)),
    ),
    (keys.APPEND_LEN_MEAN, keys.APPEND_LEN_P90, lambda some: map(_tail_length, _built(some))),
    (keys.ENCODED_LEN_MEAN, keys.ENCODED_LEN_P90, lambda some: (len(_roles(a)) for a in _built(some))),
)
"""Keys of mean and 90th percentile, and what they are of."""


def _roles(answer: Answer) -> list[int]:
    """TokenRole of every token of a target and its prompt."""
    roles: list[int] = answer["target"]["roles"].tolist()
    return roles


def _tail_length(answer: Answer) -> int:
    """Tokens of the missed objects, the closing `]}` and `<|im_end|>`."""
    return sum(role in TAIL for role in _roles(answer))


def _num_prefix_slots(answer: Answer) -> int:
    roles = _roles(answer)
    return sum(roles[at] == TokenRole.MATCHED_PREFIX for at in answer["target"]["slots"].tolist())


def _share_repeated(answer: Answer) -> float:
    """Objects that an earlier one of the same name covers, IoU above 0.9."""
    objects = list(zip(answer["descs"], map(box_of, answer["bins"]), strict=True))
    repeats = [
        any(name == before and box_iou(box, other) > REPEATED for before, other in objects[:index])
        for index, (name, box) in enumerate(objects)
    ]
    return sum(repeats) / len(repeats) if repeats else 0.0


def _num_masked(built: Sequence[Answer], config: Mapping[str, Any]) -> float:
    """Tokens of names in the tail, where names of missed objects are not taught."""
    section = config["stage2_ab"] or config["rollout_matching"]
    text = next((one for one in section["pipeline"]["objective"] if one["name"] == "token_ce"), None)
    is_on = text is not None and text["enabled"] and "B" in text["channels"]
    are_taught = is_on and text is not None and text["weight"] * text["config"]["rollout_fn_desc_weight"] > 0
    return 0.0 if are_taught else _total(built, _num_tail_names)


def _num_tail_names(answer: Answer) -> int:
    types = answer["target"]["types"].tolist()
    pairs = zip(_roles(answer), types, strict=True)
    return sum(role == TokenRole.FN_TAIL and kind == TokenType.DESC for role, kind in pairs)


def _drops(answers: Sequence[Answer]) -> dict[str, float]:
    reasons: Counter[str] = Counter()
    for answer in answers:
        reasons.update(answer["dropped_by_reason"])
    ambiguous = reasons.get(DropReason.AMBIGUOUS.value, 0)
    return {
        stage2.STRICT_DROP_N_VALID_PRED: _total(answers, lambda a: len(a["descs"])),
        stage2.STRICT_DROP_N_DROP_INVALID: float(sum(reasons.values()) - ambiguous),
        stage2.CLOSURE_N_DROP: float(len(answers) - len(_built(answers))),
        stage2.CHANNEL_B_INVALID_ROLLOUT: _total(answers, lambda a: a["prefix_is_fallback"]),
    } | {stage2.strict_drop_reason(reason): float(number) for reason, number in reasons.items()}


def _knobs(settings: Mapping[str, Any], num: int) -> dict[str, float]:
    beam, decoding = settings["decode_mode"] == "beam", settings["decoding"]
    return {
        keys.DO_SAMPLE: float(not beam and decoding["temperature"] > 0),
        keys.TEMPERATURE: float(decoding["temperature"]),
        keys.TOP_P: float(decoding["top_p"]),
        keys.TOP_K: float(decoding["top_k"]),
        keys.DECODE_BEAM_COUNT: float(num * beam),
        keys.DECODE_NON_BEAM_COUNT: float(num * (not beam)),
        keys.REPEAT_TERMINATE_ACTIVE: float(settings["repeat_terminate"]["enabled"]),
    }


def _percentiles(step: DumpedStep) -> dict[str, float]:
    """Each rank's own, then their mean (the 99th: the largest); a rank without any has none."""
    values = {}
    for _, p90, lengths_of in (*LENGTHS, ("", keys.GEN_NEW_TOKENS_P90, LENGTHS[1][2])):
        lengths = [list(lengths_of(plan["answers"])) for plan in step.plans]
        per_rank = [float(np.percentile(one, 90)) for one in lengths if one]
        if per_rank:
            values[p90] = sum(per_rank) / len(per_rank)
    largest: dict[str, Callable[[Answer], float]] = {
        keys.GEN_NEW_TOKENS_P99: lambda answer: answer["num_tokens"],
        keys.DUPLICATE_RATE_P99: _share_repeated,
    }
    asked = [plan["answers"] for plan in step.plans if plan["answers"]]
    for key, number in largest.items():
        values[key] = max(float(np.percentile([number(answer) for answer in some], 99)) for some in asked)
    return values


def _times(step: DumpedStep) -> dict[str, float]:
    """Of the slowest rank, by its own clock."""
    names = {
        keys.TIME_ROLLOUT_GENERATE: "generate",
        keys.TIME_ROLLOUT_PARSE_MATCH: "parse_match",
        keys.TIME_ROLLOUT_TEACHER_ENCODE: "encode",
    }
    asked = [plan for plan in step.plans if plan["answers"]]
    return {key: max(plan["seconds"][name] for plan in asked) for key, name in names.items()}


def _packs(step: DumpedStep) -> dict[str, float]:
    """Packs of all ranks; none where batches are padded."""
    settings = step.config["rollout_matching"]
    packs = [forward for plan in step.plans for forward in counted(plan)]
    if not settings["packing"] or not packs:
        return {}
    used = sum(pack["inputs"]["input_ids"].numel() for pack in packs)
    return {
        keys.PACKING_FILL: used / (settings["packing_length"] * len(packs)),
        keys.PACKING_SEGMENTS: sum(pack["num_samples"] for pack in packs) / len(packs),
        keys.PACKING_BUFFER: 0.0,
    }


def _descriptions(step: DumpedStep) -> dict[str, float]:
    """Names of matched pairs against each other, the first `max_pairs` of a rank."""
    settings = step.config["rollout_matching"]["desc_monitor"]
    if not settings["enabled"] or step.step % settings["every_steps"]:
        return {}
    pairs = []
    for plan in step.plans:
        own = [(a["descs"][p], a["gt_descs"][g]) for a in plan["answers"] for p, g in a["matched"]]
        pairs += [(_folded(pred), _folded(true)) for pred, true in own[: settings["max_pairs"]]]
    exact = [pred == true for pred, true in pairs]
    values = {keys.DESC_PAIRS_TOTAL: float(len(pairs)), keys.DESC_SEM_ENABLED: 0.0}
    if pairs:
        values[keys.DESC_EXACT_ACC_ON_MATCHED] = sum(exact) / len(exact)
    model = _embedder(settings) if settings["mode"] == "semantic" else None
    return values if model is None else values | _similar(pairs, exact, model, settings["semantic_threshold"])


def _similar(
    pairs: Sequence[tuple[str, str]], exact: Sequence[bool], model: Any, threshold: float
) -> dict[str, float]:
    """By cosine of two embeddings; an empty name has none."""
    cosines: list[float | None] = []
    for pred, true in pairs:
        if not pred or not true:
            cosines.append(None)
            continue
        a, b = (vector.astype(np.float64) for vector in model.encode([pred, true], show_progress_bar=False))
        cosines.append(float(a @ b / np.linalg.norm(a) / np.linalg.norm(b)))
    known = [cosine for cosine in cosines if cosine is not None]
    same = [e or (c is not None and c >= threshold) for e, c in zip(exact, cosines, strict=True)]
    values = {keys.DESC_SEM_ENABLED: 1.0, keys.DESC_SEM_SIM_COUNT: float(len(known))}
    if pairs:
        values[keys.DESC_SEM_ACC_ON_MATCHED] = sum(same) / len(same)
    return values | ({keys.DESC_SEM_SIM_MEAN: sum(known) / len(known)} if known else {})


def _folded(desc: str) -> str:
    """NFC, no case, runs of blanks as one."""
    return " ".join(unicodedata.normalize("NFC", unicodedata.normalize("NFC", desc).casefold()).split())


def _embedder(settings: Mapping[str, Any]) -> Any:
    """The sentence model of the run, None where it cannot be had here either."""
    try:
        from sentence_transformers import SentenceTransformer

        model = SentenceTransformer(settings["semantic_model"], device="cpu", local_files_only=True)
    except (ImportError, OSError, ValueError, RuntimeError):
        return None
    if settings["max_length"] is not None:
        model.max_seq_length = settings["max_length"]
    return model

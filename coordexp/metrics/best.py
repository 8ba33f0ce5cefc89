"""Which evaluation number may pick the best checkpoint of a run, and in which direction; which number of training
records a controller may steer. No torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from coordexp.config.checks.problems import Place, Problem, closest
from coordexp.config.schema.custom import RLHF, STAGE1_VARIANTS
from coordexp.config.schema.rollout import RolloutMatching
from coordexp.config.schema.rollout_eval import RolloutEval
from coordexp.config.schema.sections import Sections
from coordexp.config.schema.training import SetpointController
from coordexp.metrics import keys_rollout, keys_run, keys_stage1, keys_tokens
from coordexp.metrics.catalog import EVAL_PREFIX, known_instead, lookup
from coordexp.metrics.keys_datasets import (
    DATASET_LOSS,
    EVALUATION_BY_DATASET,
    STAGE1_BY_DATASET,
    dataset_key,
)


@dataclass(frozen=True)
class BestMetric:
    """key: its name in training logs, without `eval_`.  greater_is_better: its direction in the catalogue."""

    key: str
    greater_is_better: bool

    @property
    def logged_as(self) -> str:
        """The key that evaluation logs."""
        return EVAL_PREFIX + self.key


def evaluation_keys(variant: str, sections: Sections) -> tuple[str, ...]:
    """The keys, without `eval_`, that evaluation under a trainer variant can report."""
    if variant not in STAGE1_VARIANTS and sections.rollout_matching is not None:
        return _rollout_keys(sections.rollout_matching, sections)
    groups = [keys_stage1.BASE_CE, keys_stage1.COORD_DIAG, keys_stage1.COORD_ALIAS]
    latent = keys_stage1.LATENT_EVALUATION if sections.custom.latent_prefix is not None else ()
    if sections.custom.token_type_metrics.enabled:
        groups += keys_tokens.SECTIONS
    known = (keys_run.LOSS, keys_tokens.TOKEN_ACC, *(spec.key for group in groups for spec in group))
    rollout_eval = sections.custom.rollout_eval
    asked = _rollout_keys(rollout_eval, sections) if rollout_eval.enabled else ()
    return known + latent + _of_datasets(sections, (DATASET_LOSS, *STAGE1_BY_DATASET)) + asked


def why_not_reported(logged: str, variant: str, sections: Sections) -> str | None:
    """What is wrong with `logged` as the key of an evaluation's number; None where evaluation reports it."""
    if lookup(logged) is None:
        return f"not in the catalogue of metrics (runbooks/metrics.md){known_instead(logged)}"
    beside = keys_stage1.LATENT_BASELINES if sections.custom.latent_prefix is not None else ()
    known, name = evaluation_keys(variant, sections) + beside, logged.removeprefix(EVAL_PREFIX)
    if logged.startswith(EVAL_PREFIX) and name in known:
        return None
    near = closest(name, known)
    hint = f"; did you mean {EVAL_PREFIX}{near}?" if near else "."
    return f"the evaluation of trainer variant {variant} reports no such number" + hint


def _rollout_keys(settings: RolloutMatching | RolloutEval, sections: Sections) -> tuple[str, ...]:
    detection = settings.eval_detection
    coco = keys_rollout.EVALUATION_DETECTION[detection.metrics] if detection.enabled else ()
    descs = keys_rollout.EVALUATION_DESC if settings.desc_monitor.enabled else ()
    known = keys_rollout.EVALUATION + coco + descs
    split = tuple(key for key in EVALUATION_BY_DATASET if key in known)
    return known + _of_datasets(sections, split)


def _of_datasets(sections: Sections, keys: Sequence[str]) -> tuple[str, ...]:
    """`keys` of every data set of a mixture that has validation records."""
    fusion = sections.custom.fusion
    return tuple(dataset_key(name, key) for name in (fusion.evaluated if fusion else ()) for key in keys)


def choose_best_metric(
    asked_for: str | None, greater_is_better: bool | None, variant: str, sections: Sections
) -> BestMetric:
    """Settle `metric_for_best_model` and `greater_is_better`.

    Args:
        asked_for: as the user wrote it, with or without `eval_`. None takes rollout/f1 where evaluation asks the model
            (stage 2, and stage 1 with `custom.rollout_eval`), else the loss.
        greater_is_better: as the user wrote it; None takes the direction of the catalogue.

    Raises:
        ValueError: a number that evaluation does not report or that has no better direction, or a contradiction.
    """
    if asked_for is None:
        writes = variant not in STAGE1_VARIANTS or sections.custom.rollout_eval.enabled
        key = keys_rollout.F1 if writes else keys_run.LOSS
    else:
        key = asked_for.removeprefix(EVAL_PREFIX)
    known = evaluation_keys(variant, sections)
    if key not in known:
        near = closest(key, known)
        hint = f" Did you mean {near}?" if near else ""
        raise ValueError(
            f"the evaluation of trainer variant {variant} reports no such number.{hint} {_expected(known)}"
        )
    better = _better(key)
    if better is None:
        raise ValueError(f"neither more nor less of it is better. {_expected(known)}")
    greater = better == "higher"
    if greater_is_better is not None and greater_is_better is not greater:
        raise ValueError(
            f"{key} is better when {better}, but greater_is_better is {str(greater_is_better).lower()}; remove "
            "greater_is_better."
        )
    return BestMetric(key, greater)


def why_not_best(metric: BestMetric, evaluation: Mapping[str, float]) -> str | None:
    """Why an evaluation cannot be the best one whatever its numbers, None where it can.

    evaluation: the keys that were logged, with `eval_`.
    """
    if metric.logged_as not in evaluation:
        return f"it reported no {metric.logged_as}"
    if evaluation.get(EVAL_PREFIX + keys_rollout.PRED_OBJECTS) == 0:
        return "the model predicted no object at all"
    failed = evaluation.get(EVAL_PREFIX + keys_rollout.COCO_EVAL_OK) == 0
    return "COCO evaluation failed" if failed and metric.key == keys_rollout.MAP else None


def _better(key: str) -> str | None:
    spec = lookup(key)
    return None if spec is None else spec.better


def _expected(known: Sequence[str]) -> str:
    directed = sorted(key for key in known if _better(key))
    return f"Expected one of {', '.join(directed)} (with or without `{EVAL_PREFIX}`)."


def best_metric_problems(
    variant: str,
    sections: Sections,
    swift: Mapping[str, object],
    written: Callable[[str], tuple[str, Place | None]],
) -> list[Problem]:
    """What is wrong with `metric_for_best_model` and `greater_is_better` among ms-swift's arguments.

    written: how and where an argument was written.
    """
    asked_for, greater = swift.get("metric_for_best_model"), swift.get("greater_is_better")
    if variant == RLHF:  # ms-swift's trainer, with numbers of its own
        return []
    try:
        choose_best_metric(
            None if asked_for is None else str(asked_for),
            None if greater is None else bool(greater),
            variant,
            sections,
        )
    except ValueError as error:
        name = "metric_for_best_model" if asked_for is not None else "greater_is_better"
        path, place = written(name)
        return [Problem(path, str(error), value=swift[name], place=place)]
    return []


_DECIDED = ("control/", "schedule/")


def steered_metric_problems(
    _variant: str,
    sections: Sections,
    _swift: Mapping[str, object],
    _written: Callable[[str], tuple[str, Place | None]],
) -> list[Problem]:
    """What is wrong with the metrics of `control.controllers`: unknown, of evaluation, or not reduced by us."""
    problems = []
    for index, controller in enumerate(sections.control.controllers):
        if isinstance(controller, SetpointController):
            fault = _why_not_steered(controller.metric)
            if fault:
                path = f"control.controllers[{index}].metric"
                problems.append(Problem(path, fault, value=controller.metric))
    return problems


def _why_not_steered(key: str) -> str | None:
    if key.startswith(EVAL_PREFIX):
        return "is a number of evaluation; expected a key of training records."
    spec = lookup(key)
    if spec is None:
        return f"is not in the catalogue of metrics{known_instead(key)}"
    if key.startswith(_DECIDED):
        return "is decided by controllers and schedules; expected a number that is measured."
    if spec.source != "coordexp":
        return f"is logged by {spec.source}, and not reduced over ranks here; expected one of the other keys."
    return None

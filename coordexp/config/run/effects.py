"""Settings that a run could not act on, each refused with a sentence that says what would act."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from coordexp.config.checks.problems import KeyPath, PlaceOf, Problem, WrittenOf, closest, dotted, one_of
from coordexp.config.contradictions import rlhf
from coordexp.config.contradictions.answer_forms import form_problems
from coordexp.config.contradictions.controllers import control_problems
from coordexp.config.contradictions.latent import latent_problems
from coordexp.config.contradictions.rollouts import contradictions
from coordexp.config.run.data_files import files_of_mixture, files_of_sources
from coordexp.config.run.optimizers import has_other_plugins, optimizer_problems, options_without_effect
from coordexp.config.schema.custom import RLHF, STAGE1_VARIANTS
from coordexp.config.schema.rollout import RolloutMatching
from coordexp.config.schema.sections import Sections

SWIFT_TUNERS = (
    "lora", "full", "adalora", "longlora", "llamapro", "adapter", "vera", "boft", "fourierft", "reft", "bone", "ia3",
    "lora_llm", "dummy",
)  # fmt: skip
"""What ms-swift knows as `tuner_type`."""


def effect_problems(
    variant: str, sections: Sections, swift: Mapping[str, Any], written: WrittenOf, place: PlaceOf
) -> list[Problem]:
    """Every setting of a run that its trainer variant, its backend or its other settings leave without effect."""
    ours = [
        Problem(dotted(path), text, place=place(path))
        for path, text in _ours_without_effect(variant, sections, swift)
    ]
    theirs = []
    further = [*optimizer_problems(swift), *_tuner(swift), *_links(swift), *_determinism(sections, swift)]
    if variant == RLHF:
        further += rlhf.theirs_without_effect(sections, swift)
    for name, text in further:
        path, where = written(name)
        theirs.append(Problem(path, text, value=swift[name], place=where))
    return ours + theirs


def _augmentation(sections: Sections, swift: Mapping[str, Any]) -> Iterator[tuple[KeyPath, str]]:
    settings = sections.custom.augmentation
    if not settings.enabled:
        return
    here = ("custom", "augmentation")
    if swift.get("packing"):
        yield (
            here,
            "ms-swift's own packing shows the same picture at every turn. Write training.packing: true instead (in "
            "ms-swift's flat form coordexp: {training: {packing: true}}).",
        )
    is_packed = bool(swift.get("packing")) or sections.training.packing or bool(swift.get("group_by_length"))
    if is_packed and settings.largest_scale > 1:
        yield (
            (*here, "ops"),
            "resize_by_scale with hi above 1 makes samples longer than they were when they were packed or grouped by "
            "length; set hi to 1, or train without that.",
        )


def _fusion(sections: Sections, swift: Mapping[str, Any]) -> Iterator[tuple[KeyPath, str]]:
    custom = sections.custom
    if custom.fusion is None:
        return
    here = ("custom", "fusion")
    for key, argument, given in (
        ("train_jsonl", "dataset", custom.train_jsonl),
        ("val_jsonl", "val_dataset", custom.val_jsonl),
    ):
        files = files_of_mixture(custom.fusion, validation=key == "val_jsonl")
        if given is not None:
            yield (
                ("custom", key),
                f"custom.fusion names the data sets of the run; write {key} in its sources.",
            )
        elif (swift.get(argument) or []) != files:
            yield (here, _other_files(argument, files))
    owners: dict[str, str] = {}
    for name, files in files_of_sources(custom.fusion, validation=False).items():
        for file in files:
            if owners.setdefault(file, name) != name:
                yield (
                    (*here, "sources"),
                    f"{file} belongs to both {owners[file]} and {name}; a record has one data set.",
                )
    for key, why in _NOT_WITH_FUSION.items():
        if swift.get(key):
            yield (here, f"cannot be had together with {key}, {why}")


_NOT_WITH_FUSION = {
    "packing": "ms-swift's own packing, which shows the same samples in every epoch. Write training.packing: true "
    "instead (in ms-swift's flat form coordexp: {training: {packing: true}}).",
    "group_by_length": "which would change the order that keeps the shares; remove it.",
    "split_dataset_ratio": "which would take validation records out of the mixture; give sources a val_jsonl.",
    "interleave_prob": "ms-swift's own way to mix data sets; remove it: weights say the same.",
}


def _other_files(argument: str, files: list[str]) -> str:
    return (
        f"names the data sets of the run, so `{argument}` must be left out (coordexp train fills it in); plain "
        f"`swift sft` needs {argument}: [{', '.join(files)}]."
    )


def _rows_trained_twice(sections: Sections, swift: Mapping[str, Any]) -> Iterator[tuple[KeyPath, str]]:
    """Offsets of the coordinate rows beside another training of embedding or head that they cannot be merged with."""
    if not sections.custom.coord_offset.enabled:
        return
    saved, targets = (ends_in(swift.get(key)) for key in ("modules_to_save", "target_modules"))
    if saved:
        yield (
            ("custom", "coord_offset"),
            f"modules_to_save trains a whole copy of {' and '.join(saved)}, rows of coordinate tokens included; keep "
            "one of the two.",
        )
    if targets and swift.get("use_dora"):
        yield (
            ("custom", "coord_offset"),
            f"use_dora on {' and '.join(targets)} scales rows without their offsets, so that the two cannot be merged; "
            "leave embedding and head out of target_modules.",
        )


def ends_in(names: Any) -> list[str]:
    """What of ms-swift's module names is the embedding or the head."""
    listed = names if isinstance(names, list | tuple) else [names]
    return [name for name in ("embed_tokens", "lm_head", "all-embedding") if name in listed]


def _ours_without_effect(
    variant: str, sections: Sections, swift: Mapping[str, Any]
) -> Iterator[tuple[KeyPath, str]]:
    if variant == RLHF:
        yield from rlhf.ours_without_effect(sections)
        yield from form_problems(sections, variant)
        yield from _pixel_limits(sections, swift)
        return
    if sections.custom.teacher_prompt is not None:
        yield ("custom", "teacher_prompt"), "is asked in swift rlhf alone (rlhf_type: gkd); remove it."
    yield from _augmentation(sections, swift)
    yield from options_without_effect(sections, swift)
    yield from control_problems(variant, sections, swift)
    yield from _fusion(sections, swift)
    yield from _rows_trained_twice(sections, swift)
    stage2 = variant not in STAGE1_VARIANTS
    yield from _rollout_eval(stage2, sections, swift)
    yield from _goals(sections, swift)
    yield from _objective_of_stage1(variant, sections)
    yield from form_problems(sections, variant)
    yield from _watching(sections, swift)
    yield from latent_problems(variant, sections, swift)
    yield from _pixel_limits(sections, swift)
    if sections.rollout_matching is not None:
        yield from _rollouts(variant, sections.rollout_matching, sections.custom.prompt_variants)
        yield from _targets(sections, sections.rollout_matching)


def _pixel_limits(sections: Sections, swift: Mapping[str, Any]) -> Iterator[tuple[KeyPath, str]]:
    least, most = sections.custom.min_pixels, swift.get("max_pixels")
    if least is not None and isinstance(most, int) and least > most:
        yield ("custom", "min_pixels"), f"{least} is more than max_pixels {most}."


def _objective_of_stage1(variant: str, sections: Sections) -> Iterator[tuple[KeyPath, str]]:
    here, loss = ("custom", "coord_soft_ce_w1"), sections.custom.coord_soft_ce_w1
    if variant not in STAGE1_VARIANTS:
        if loss.model_fields_set:
            objective = (
                "rollout_matching.pipeline" if variant == "stage2_rollout_aligned" else "stage2_ab.pipeline"
            )
            yield here, f"is the objective of stage 1; that of {variant} is {objective}. Remove it."
        return
    if loss.enabled and not any((loss.soft_ce_weight, loss.w1_weight, loss.ce_weight, loss.gate_weight)):
        yield (
            here,
            "every weight is 0, so that coordinates are never trained; give one of them a weight, or write enabled: "
            "false for cross-entropy on every token.",
        )


def _watching(sections: Sections, swift: Mapping[str, Any]) -> Iterator[tuple[KeyPath, str]]:
    """Lines that would be asked for more often than there are records; a probe without samples."""
    if sections.telemetry.trajectory_probe.every_steps is not None and not _validation(sections, swift):
        yield (
            ("telemetry", "trajectory_probe"),
            "needs validation records (custom.val_jsonl, or val_dataset), and there are none.",
        )
    every, logged = sections.telemetry.console.every_steps, swift.get("logging_steps")
    for name in sorted(every.model_fields_set):
        steps = int(getattr(every, name))
        if isinstance(logged, int) and steps < logged:
            yield (
                ("telemetry", "console", "every_steps", name),
                f"{steps} has no effect with logging_steps: {logged}, since a line needs a record; lower "
                "logging_steps.",
            )


def _rollouts(
    variant: str, rollout: RolloutMatching, variants: Mapping[str, str]
) -> Iterator[tuple[KeyPath, str]]:
    yield from contradictions(rollout)
    name = rollout.eval_prompt_variant
    if name is not None and name not in variants:
        near = closest(name, variants)
        yield (
            ("rollout_matching", "eval_prompt_variant"),
            f"custom.prompt_variants has no message called {name}"
            + (
                f"; did you mean {near}?"
                if near
                else f"; it has {', '.join(variants) or 'none'}. Write it there."
            ),
        )
    if variant == "stage2_two_channel" and "coord_decode_mode" in rollout.model_fields_set:
        yield (
            ("rollout_matching", "coord_decode_mode"),
            "has no effect with trainer variant stage2_two_channel, which reads stage2_ab.coord_decode_mode; write it "
            "there.",
        )
    if rollout.backend == "hf" and rollout.vllm.model_fields_set:
        yield (
            ("rollout_matching", "vllm"),
            "has no effect with backend: hf, which has no vLLM engine; remove it (over a file that is extended: "
            "vllm: null), or use backend: vllm.",
        )


def _targets(sections: Sections, rollout: RolloutMatching) -> Iterator[tuple[KeyPath, str]]:
    here, targets = ("rollout_matching", "targets"), rollout.targets
    if targets.missed == "in_order" and sections.custom.object_ordering == "random":
        yield (
            (*here, "missed"),
            "in_order needs an order that a target keeps, but custom.object_ordering is random; use append, or "
            "object_ordering: sorted.",
        )
    two_channel = sections.stage2_ab
    changes = targets != type(targets)()
    if changes and two_channel is not None and two_channel.schedule.never_runs_b:
        yield (
            here,
            "changes what channel B teaches, but stage2_ab.schedule.b_ratio is 0 throughout; remove it.",
        )


def _tuner(swift: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    name = swift.get("tuner_type")
    if name is None or name in SWIFT_TUNERS or has_other_plugins(swift):
        return
    yield "tuner_type", f"{one_of(name, SWIFT_TUNERS)}, or one that a file of external_plugins registers."


def _rollout_eval(
    stage2: bool, sections: Sections, swift: Mapping[str, Any]
) -> Iterator[tuple[KeyPath, str]]:
    settings, samples = sections.custom.rollout_eval, sections.custom.generation_samples
    here = ("custom", "rollout_eval")
    if not settings.enabled:
        if not stage2 and samples.model_fields_set:
            yield (
                ("custom", "generation_samples"),
                "has no effect in stage 1 without custom.rollout_eval.enabled: true, since nothing is generated.",
            )
        return
    if stage2:
        yield here, "has no effect in stage 2, whose evaluation asks the model anyway; remove it."
        return
    yield from contradictions(settings.rollouts)
    if not _validation(sections, swift):
        yield here, "needs validation records (custom.val_jsonl, or val_dataset), and there are none."
    strategy = swift.get("eval_strategy") or swift.get("save_strategy")
    if strategy == "no" and settings.every_steps is None:
        yield (
            here,
            "has no effect with eval_strategy: no; set eval_strategy, or custom.rollout_eval.every_steps.",
        )


def _goals(sections: Sections, swift: Mapping[str, Any]) -> Iterator[tuple[KeyPath, str]]:
    if not sections.training.stop_when:
        return
    strategy = swift.get("eval_strategy") or swift.get("save_strategy")
    own = sections.custom.rollout_eval
    if not _validation(sections, swift) or (strategy == "no" and not (own.enabled and own.every_steps)):
        yield (
            ("training", "stop_when"),
            "is judged at evaluations, and there are none; set eval_strategy and validation records "
            "(custom.val_jsonl, or val_dataset), or remove it.",
        )


def _validation(sections: Sections, swift: Mapping[str, Any]) -> bool:
    """Whether there are validation records."""
    fusion = sections.custom.fusion
    return bool(swift.get("val_dataset") or swift.get("split_dataset_ratio") or (fusion and fusion.evaluated))


def _determinism(sections: Sections, swift: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    if swift.get("full_determinism") and sections.custom.deterministic is False:
        yield "full_determinism", "contradicts custom.deterministic: false; remove one of them."


def _links(swift: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    if swift.get("create_checkpoint_symlink"):
        yield (
            "create_checkpoint_symlink",
            "the link `best` in the run folder is kept by coordexp at every save, and ms-swift's would fail on it at "
            "the end of the run; remove it.",
        )

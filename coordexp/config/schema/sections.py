"""Our typed sections, from a run file, from `--coordexp '{...}'` or from a `--coordexp_config` file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import Field

from coordexp.config.checks.not_built import find_not_built
from coordexp.config.checks.problems import Place, Problem, one_of, raise_problems
from coordexp.config.checks.removed import removed_variant
from coordexp.config.checks.validation import validate
from coordexp.config.checks.yaml_tree import Tree, read_yaml
from coordexp.config.schema.custom import RLHF, VARIANT_ALIASES, VARIANTS, Custom, Debug, Experiment
from coordexp.config.schema.pipeline import canonical_hash, pipeline_checksum
from coordexp.config.schema.rollout import RolloutMatching
from coordexp.config.schema.section import Section
from coordexp.config.schema.stage2 import Stage2AB
from coordexp.config.schema.telemetry import Telemetry
from coordexp.config.schema.training import Control, Training


class Sections(Section):
    """The settings a trainer reads. `stage2_ab` and `rollout_matching` belong to stage 2."""

    custom: Custom = Custom()
    stage2_ab: Stage2AB | None = Field(default=None, description="Needed by stage2_two_channel.")
    rollout_matching: RolloutMatching | None = Field(
        default=None, description="Needed by both stage-2 variants."
    )
    training: Training = Training()
    control: Control = Control()
    telemetry: Telemetry = Telemetry()
    debug: Debug = Debug()
    experiment: Experiment = Experiment()

    def to_json(self) -> dict[str, Any]:
        """Only what was set, as plain JSON values: what travels in `--coordexp`."""
        return self.model_dump(exclude_unset=True)


# Keys that only `coordexp train` can act on, and what plain `swift sft` takes instead.
LAUNCHER_ONLY: dict[tuple[str, ...], str] = {
    ("custom", "train_jsonl"): "`dataset: [FILE]`",
    ("custom", "val_jsonl"): "`val_dataset: [FILE]`",
    ("global_max_length",): "`max_length`",
    ("training", "effective_batch_size"): "`gradient_accumulation_steps`",
    ("deepspeed",): "`deepspeed: zero2`",
}


def parse_sections(
    mapping: Mapping[str, Any], source: str = "--coordexp", *, refuse_not_built: bool = True
) -> Sections:
    """Typed sections from plain values, as they arrive in `--coordexp`.

    Raises:
        ConfigError: every problem, with its dotted path.
    """
    return sections_from_tree(Tree(dict(mapping), {(): Place(source)}), refuse_not_built=refuse_not_built)


def read_sections_file(path: str | Path) -> Sections:
    """Typed sections from a YAML file that holds nothing else (`--coordexp_config FILE`); `extends` works.

    Raises:
        ConfigError: every problem, with its dotted path, file and line.
    """
    return sections_from_tree(read_yaml(path))


def sections_from_tree(tree: Tree, *, refuse_not_built: bool = True) -> Sections:
    """As `parse_sections`, for a tree that knows its places."""
    problems = launcher_only_problems(tree)
    rest = tree.without(tuple(problem.path.split(".")) for problem in problems)
    sections, of_schema = validate(Sections, rest)
    problems += of_schema
    if refuse_not_built:
        problems += find_not_built(tree)
    raise_problems(problems)
    if sections is None:
        raise AssertionError("sections that are no model have a problem")
    return sections


def launcher_only_problems(tree: Tree) -> list[Problem]:
    """Keys that would have no effect where only the plugin reads the sections."""
    problems = []
    for path, instead in LAUNCHER_ONLY.items():
        here: Any = tree.data
        for part in path:
            here = here.get(part) if isinstance(here, Mapping) else None
        if here is not None:
            text = f"has no effect here; write {instead} at the top level, where ms-swift reads it."
            problems.append(Problem(".".join(path), text, place=tree.place(path)))
    training = tree.data.get("training")
    for key in training if isinstance(training, Mapping) else ():
        if key not in Training.model_fields:
            text = f"has no effect here; write {key} at the top level, where ms-swift reads it."
            problems.append(Problem(f"training.{key}", text, place=tree.place(("training", key))))
    return problems


def check_variant(name: object) -> str:
    """The full name of a trainer variant, with aliases spelt out.

    Raises:
        ValueError: a name that was removed or never existed, with what to write instead.
    """
    full = VARIANT_ALIASES.get(name, name) if isinstance(name, str) else name
    if isinstance(full, str) and full in VARIANTS:
        return full
    raise ValueError(removed_variant(name) or one_of(name, VARIANTS))


_SECTIONS_OF = {
    RLHF: (),
    "stage1_coord": (),
    "latent_prefix": (),
    "stage2_rollout_aligned": ("rollout_matching",),
    "stage2_two_channel": ("stage2_ab", "rollout_matching"),
}


def check_sections_fit(sections: Sections, variant: str, tree: Tree | None = None) -> list[Problem]:
    """Sections that a variant needs and lacks, or that it would not read. `tree` knows where they were written."""
    tree = tree or Tree({}, {})
    problems = []
    for name in ("stage2_ab", "rollout_matching"):
        given, needed = getattr(sections, name) is not None, name in _SECTIONS_OF[variant]
        if given and not needed:
            text = f"has no effect with trainer variant {variant}; remove it or choose another variant."
            problems.append(Problem(name, text, place=tree.place((name,))))
        elif needed and not given:
            problems.append(Problem(name, f"is missing; trainer variant {variant} needs it."))
    rollout = sections.rollout_matching
    if rollout is not None and (rollout.pipeline is None) == (variant == "stage2_rollout_aligned"):
        wanted = (
            "is missing; it holds the objective of this variant"
            if rollout.pipeline is None
            else (
                f"has no effect with trainer variant {variant}, whose objective is stage2_ab.pipeline; "
                f"remove it"
            )
        )
        problems.append(
            Problem(
                "rollout_matching.pipeline", f"{wanted}.", place=tree.place(("rollout_matching", "pipeline"))
            )
        )
    return problems


def sections_hash(sections: Sections) -> str:
    """sha256 of what the sections say about training; `telemetry`, `debug` and `experiment` are run context."""
    return canonical_hash(
        sections.model_dump(
            exclude={
                "debug": True,
                "experiment": True,
                "telemetry": True,
                "training": {"effective_batch_size"},
                "custom": {"dry_run", "evaluate_only", "generation_samples"},
            }
        )
    )


def pipeline_of(sections: Sections, variant: str) -> tuple[Any, dict[str, Any]] | None:
    """The pipeline of a stage-2 variant and the semantic settings that belong to its identity, or None."""
    stage2, rollout = sections.stage2_ab, sections.rollout_matching
    if variant == "stage2_two_channel" and stage2 is not None:
        extra: dict[str, Any] = {
            "variant": variant,
            "stage2_ab.coord_ctx_embed_mode": stage2.coord_ctx_embed_mode,
            "stage2_ab.coord_decode_mode": stage2.coord_decode_mode,
        }
        return stage2.pipeline, extra
    if variant == "stage2_rollout_aligned" and rollout is not None and rollout.pipeline is not None:
        return rollout.pipeline, {
            "variant": variant,
            "rollout_matching.coord_decode_mode": rollout.coord_decode_mode,
        }
    return None


def checksum_of(sections: Sections, variant: str) -> str | None:
    """`pipeline_checksum` of a run, or None for a variant without a pipeline."""
    found = pipeline_of(sections, variant)
    return None if found is None else pipeline_checksum(*found)

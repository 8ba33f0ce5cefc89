"""`resolved_config.json`: what a run was told, what follows from it, and a hash to know it by."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from coordexp.config.checks.swift_arguments import all_arguments
from coordexp.config.checks.validation import models_in
from coordexp.config.schema.custom import RLHF
from coordexp.config.schema.pipeline import Pipeline, canonical_hash, pipeline_identity
from coordexp.config.schema.sections import Sections, checksum_of, pipeline_of
from coordexp.files import write_json

RESOLVED_FILE = "resolved_config.json"

RUN_CONTEXT = frozenset(
    {
        "add_version",
        "create_checkpoint_symlink",
        "data_seed",
        "ddp_backend",
        "ddp_timeout",
        "disable_tqdm",
        "external_plugins",
        "hub_model_id",
        "hub_private_repo",
        "hub_revision",
        "hub_strategy",
        "hub_token",
        "ignore_args_error",
        "load_from_cache_file",
        "local_rank",
        "log_level",
        "log_level_replica",
        "logging_dir",
        "output_dir",
        "project",
        "push_to_hub",
        "report_to",
        "resume_from_checkpoint",
        "run_name",
        "save_total_limit",
        "seed",
        "use_hf",
    }
)
"""ms-swift arguments (and `swanlab_*`) that say where and how a run is kept, not what it computes."""

SECRETS = frozenset({"hub_token", "swanlab_token", "swanlab_secret", "swanlab_webhook_url"})


def is_run_context(name: str) -> bool:
    """Whether an ms-swift argument is left out of the hash."""
    return name in RUN_CONTEXT or name.startswith("swanlab_")


def config_hash(
    variant: str, sections: Sections, swift: Mapping[str, Any], *, without_defaults: bool = False
) -> str:
    """sha256 of what a run computes.

    Unchanged by run name, seed, output paths, reporting, telemetry, notes and debug limits, by values that equal their
    default, by the order of keys, and by which of the two YAML forms they stand in.

    without_defaults: unchanged as well by settings that a later version adds, as long as the run does not use them; but
    blind to a default that a later version changes.
    """
    arguments = all_arguments(rlhf=variant == RLHF)
    ours = sections.model_dump(
        exclude={
            "debug": True,
            "experiment": True,
            "telemetry": True,
            "custom": {
                "trainer_variant",
                "train_jsonl",
                "val_jsonl",
                "dry_run",
                "evaluate_only",
                "generation_samples",
            },
            "training": {"effective_batch_size"},
        },
        exclude_defaults=without_defaults,
    )
    theirs = {
        name: value
        for name, value in swift.items()
        if name in arguments and not is_run_context(name) and value != arguments[name].default
    }
    return canonical_hash({"variant": variant, "sections": ours, "swift": theirs})


def derive(
    *,
    world_size: int,
    per_device_batch_size: int,
    gradient_accumulation_steps: int,
    num_train_samples: int | None = None,
    max_steps: int | None = None,
    num_epochs: float | None = None,
    warmup_steps: int | None = None,
    num_b_steps: Callable[[int], int] | None = None,
    coord_token_ids: Sequence[int] = (),
    drop_last: bool = False,
) -> dict[str, Any]:
    """The `derived` section: numbers that follow from the configuration, the data and the machine.

    `total_steps` is the schedule horizon in optimizer steps: `max_steps` if it is positive, else epochs times
    steps of an epoch (rounded up). `channel_b_steps` is what `num_b_steps` says of them.

    drop_last: whether the last batch of an epoch is left out where it is not full.
    """
    effective_batch_size = world_size * per_device_batch_size * gradient_accumulation_steps
    steps_per_epoch = None
    if num_train_samples is not None:  # ranks take equally many samples
        num_batches = num_train_samples // world_size / per_device_batch_size
        num_batches = math.floor(num_batches) if drop_last else math.ceil(num_batches)
        steps_per_epoch = max(1, math.ceil(num_batches / gradient_accumulation_steps))
    total_steps = max_steps if max_steps is not None and max_steps > 0 else None
    if total_steps is None and steps_per_epoch is not None and num_epochs is not None:
        total_steps = math.ceil(steps_per_epoch * num_epochs)
    derived = {
        "world_size": world_size,
        "per_device_batch_size": per_device_batch_size,
        "gradient_accumulation_steps": gradient_accumulation_steps,
        "effective_batch_size": effective_batch_size,
        "num_train_samples": num_train_samples,
        "steps_per_epoch": steps_per_epoch,
        "total_steps": total_steps,
        "warmup_steps": warmup_steps,
        "channel_b_steps": None if num_b_steps is None or total_steps is None else num_b_steps(total_steps),
        "coord_token_ids": id_ranges(coord_token_ids) or None,
    }
    return {key: value for key, value in derived.items() if value is not None}


def id_ranges(ids: Sequence[int]) -> list[list[int]]:
    """Ids in their order as runs `[first, last]` of consecutive numbers: [5, 6, 7, 9] -> [[5, 7], [9, 9]]."""
    runs: list[list[int]] = []
    for token_id in ids:
        if runs and token_id == runs[-1][1] + 1:
            runs[-1][1] = token_id
        else:
            runs.append([token_id, token_id])
    return runs


def resolved_config(
    variant: str,
    sections: Sections,
    swift: Mapping[str, Any],
    *,
    derived: Mapping[str, Any],
    sources: Mapping[str, str] | None = None,
    context: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The content of resolved_config.json; `context` (command, versions, ...) is kept. Secrets are masked in both."""
    resolved: dict[str, Any] = {
        "config_hash": config_hash(variant, sections, swift),
        "trainer_variant": variant,
        **sections.model_dump(),
        "swift": mask_secrets(swift, swift),
        "derived": dict(derived),
    }
    found = pipeline_of(sections, variant)
    if found is not None:
        resolved["pipeline"] = {"checksum": checksum_of(sections, variant), **pipeline_identity(*found)}
    if sources:
        resolved["sources"] = dict(sources)
    if context:
        resolved["context"] = mask_secrets(dict(context), swift)
    return resolved


def flat_of_resolved(
    resolved: Mapping[str, Any], sections: Sequence[str], *, without: Collection[str] = ()
) -> dict[str, Any]:
    """A run in ms-swift's flat form, from the content of its resolved_config.json.

    sections: ours that are taken over.  without: arguments of ms-swift that are not; null ones never are.
    """
    swift = {
        key: value for key, value in resolved["swift"].items() if key not in without and value is not None
    }
    ours = _beyond_defaults({name: resolved.get(name) for name in sections}, Sections)
    return {**swift, "coordexp": ours, "custom_trainer_variant": resolved["trainer_variant"]}


def _beyond_defaults(found: Mapping[str, Any], model: type[BaseModel]) -> dict[str, Any]:
    """What a dumped model says beyond its defaults: settings that were never written may have no effect here."""
    kept: dict[str, Any] = {}
    for name, field in model.model_fields.items():
        default = field.get_default(call_default_factory=True)
        value = found.get(name, default)
        inner = models_in(field.annotation)
        if isinstance(value, Mapping) and len(inner) == 1 and inner[0] is not Pipeline:
            value = _beyond_defaults(value, inner[0])
            if value or default is None:
                kept[name] = value
        elif value != default:
            kept[name] = value
    return kept


def mask_secrets(value: Any, swift: Mapping[str, Any]) -> Any:
    """`value` (text, or lists and mappings of it) with the tokens among the ms-swift arguments replaced by ***."""
    secrets = [str(swift[name]) for name in SECRETS if swift.get(name)]
    if isinstance(value, str):
        for secret in secrets:
            value = value.replace(secret, "***")
        return value
    if isinstance(value, Mapping):
        return {key: mask_secrets(item, swift) for key, item in value.items()}
    return [mask_secrets(item, swift) for item in value] if isinstance(value, list) else value


def write_resolved(run_dir: str | Path, resolved: Mapping[str, Any]) -> Path:
    """Write resolved_config.json into a run directory (made if missing), whole or not at all."""
    path = Path(run_dir) / RESOLVED_FILE
    write_json(path, resolved, default=str)
    return path

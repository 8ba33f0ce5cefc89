"""What follows from several keys of a migrated run together: variant, packing, batch, engine, silent defaults."""

from __future__ import annotations

from typing import Any

from coordexp.config.checks.problems import as_yaml
from coordexp.config.checks.removed import REMOVED_VARIANTS
from coordexp.config.checks.validation import models_in
from coordexp.config.migrate.convert import Migration
from coordexp.config.migrate.notes import NoteKind
from coordexp.config.migrate.prompts import PROMPT_VARIANTS
from coordexp.config.run.load import LaunchSections
from coordexp.config.schema.custom import VARIANT_ALIASES, VARIANTS
from coordexp.config.schema.prompt import DEFAULT_PROMPT

FLAGS_OF_THE_SERVER = {
    "enable_prefix_caching": "--engine-args",
    "enforce_eager": "--enforce-eager",
    "engine_args": "--engine-args",
    "gpu_memory_utilization": "--gpu-memory-utilization",
    "max_model_len": "--max-model-len",
    "max_num_seqs": "--max-num-seqs",
}
"""Setting of the engine -> the flag of `coordexp rollout-server` that takes it."""


def adjust(migration: Migration) -> None:
    """All of it, in the order in which one thing needs another."""
    _variant(migration)
    _strategies(migration)
    _debug(migration)
    _packing(migration)
    _effective_batch(migration)
    _optimizer(migration)
    _best_metric(migration)
    _prompt(migration)
    if migration.is_stage2:
        _eval_prompt(migration)
        _stage2(migration)
        _engine(migration)
    else:
        _stage1(migration)
    _write_defaults(migration)


def _variant(migration: Migration) -> None:
    name = migration.get("custom.trainer_variant")
    if name is None:
        return
    current = REMOVED_VARIANTS.get(str(name)) or VARIANT_ALIASES.get(str(name)) or str(name)
    if current not in VARIANTS:
        migration.drop("custom.trainer_variant")
        migration.note(
            NoteKind.LOST, "custom.trainer_variant", f"there is no {name} here, only {', '.join(VARIANTS)}."
        )
    elif current != name:
        migration.put("custom.trainer_variant", current)
        migration.note(NoteKind.CHANGED, "custom.trainer_variant", f"{name} is called {current}.")


def _strategies(migration: Migration) -> None:
    for name in ("eval_strategy", "save_strategy", "logging_strategy"):
        if migration.get(f"training.{name}") is False:  # a bare `no`
            migration.put(f"training.{name}", "no")


def _debug(migration: Migration) -> None:
    """There its limits and its folder hold only with `enabled: true`; here limits hold as they are."""
    asked = migration.debug
    enabled = asked.pop("enabled", None) is True
    for name, value in asked.items():
        if not enabled:
            migration.note(
                NoteKind.DROPPED, f"debug.{name}", "had no effect there without debug.enabled: true."
            )
        elif name == "output_dir":
            migration.put("training.output_dir", value)
            migration.note(NoteKind.RENAMED, "debug.output_dir", "now training.output_dir")
        elif value is not None:
            migration.put(f"debug.{name}", value)
    if enabled:
        migration.put("debug.enabled", True)


def _packing(migration: Migration) -> None:
    if migration.is_stage2:
        packing = migration.drop("training.packing")
        if packing is not None:
            migration.put("rollout_matching.packing", packing)
            migration.note(NoteKind.RENAMED, "training.packing", "now rollout_matching.packing")
    useless = migration.is_stage2 or not migration.get("training.packing")
    if useless and migration.has("training.eval_packing"):
        migration.drop("training.eval_packing")
        why = "stage 2 evaluates by rollouts" if migration.is_stage2 else "the run does not pack"
        migration.note(NoteKind.DROPPED, "training.eval_packing", f"{why}.")


def _effective_batch(migration: Migration) -> None:
    """There accumulation steps are rounded up; here they must come out whole."""
    size, each = (
        migration.get(f"training.{name}") for name in ("effective_batch_size", "per_device_train_batch_size")
    )
    if not isinstance(size, int) or not isinstance(each, int) or each < 1 or size % each == 0:
        return
    rounded = -(-size // each) * each
    migration.put("training.effective_batch_size", rounded)
    migration.note(
        NoteKind.CHANGED,
        "training.effective_batch_size",
        f"{size} is no multiple of per_device_train_batch_size = {each}; there accumulation is rounded up, which makes "
        f"{rounded} on one process.",
    )


def _optimizer(migration: Migration) -> None:
    if migration.get("training.optimizer") == "multimodal_coord_offset":
        migration.put("training.optimizer", "multimodal")
        migration.note(
            NoteKind.CHANGED,
            "training.optimizer",
            "multimodal; the offsets of custom.coord_offset get their rates under every optimizer.",
        )
    offset = "custom.coord_offset"
    head_lr = migration.get(f"{offset}.head_lr")
    if (
        head_lr is not None
        and migration.get(f"{offset}.tie_head") is not False
        and head_lr != migration.get(f"{offset}.embed_lr")
    ):
        migration.drop(f"{offset}.head_lr")
        migration.note(
            NoteKind.DROPPED, f"{offset}.head_lr", "with tie_head: true there is one table, with embed_lr."
        )


def _best_metric(migration: Migration) -> None:
    name = migration.get("training.metric_for_best_model")
    if name is None:
        return
    bare = str(name).removeprefix("eval_")
    if migration.is_stage2 and not bare.startswith("rollout/"):
        migration.drop("training.metric_for_best_model")
        migration.note(
            NoteKind.CHANGED,
            "training.metric_for_best_model",
            f"{name} is no number of evaluation by rollouts; the best checkpoint is that of the greatest rollout/f1.",
        )


def _prompt(migration: Migration) -> None:
    if not migration.has("custom.prompt"):
        migration.note(
            NoteKind.LOOK,
            "custom.prompt",
            f"the research code asks with a text of its own, which is in none of the files; ours asks "
            f"{as_yaml(DEFAULT_PROMPT)}. Put the text there that the checkpoint was trained with.",
        )


def _stage1(migration: Migration) -> None:
    for section in ("rollout_matching", "stage2_ab"):
        if migration.drop(section) is not None:
            migration.note(NoteKind.DROPPED, section, "stage 1 reads nothing of it.")


def _eval_prompt(migration: Migration) -> None:
    """There a variant is a name; here the text behind it stands in custom.prompt_variants."""
    path = "rollout_matching.eval_prompt_variant"
    name = migration.get(path)
    if name is None or name in (migration.get("custom.prompt_variants") or {}):
        return
    text = PROMPT_VARIANTS.get(str(name))
    if text is None:
        migration.drop(path)
        migration.note(
            NoteKind.LOST,
            path,
            f"no prompt of the name {as_yaml(name)} is known; write custom.prompt_variants.",
        )
        return
    migration.put(f"custom.prompt_variants.{name}", text)
    migration.note(
        NoteKind.LOOK,
        "custom.prompt_variants",
        f"{name} is a name; the text behind it is in none of the files. Ours is written out; put the text there that "
        "evaluation asked with.",
    )


def _stage2(migration: Migration) -> None:
    if migration.drop("custom.coord_soft_ce_w1") is not None:
        migration.note(
            NoteKind.DROPPED, "custom.coord_soft_ce_w1", "the objective of stage 2 is its pipeline."
        )
    if migration.variant == "stage2_rollout_aligned":
        useless = ["stage2_ab"]
    else:
        useless = ["rollout_matching.pipeline", "rollout_matching.coord_decode_mode"]
    for path in useless:
        if migration.drop(path) is not None:
            migration.note(NoteKind.DROPPED, path, f"{migration.variant} reads nothing of it.")


def _engine(migration: Migration) -> None:
    vllm = "rollout_matching.vllm"
    if migration.get("rollout_matching.backend") == "hf":
        if migration.drop(vllm) is not None:
            migration.note(NoteKind.DROPPED, vllm, "backend: hf has no vLLM engine.")
        return
    if migration.get(f"{vllm}.mode") != "server":
        if migration.drop(f"{vllm}.server") is not None:
            migration.note(
                NoteKind.DROPPED, f"{vllm}.server", "the engine runs inside the training processes."
            )
        return
    for name in ("sleep_level", "tensor_parallel_size"):
        if migration.has(f"{vllm}.{name}"):
            migration.drop(f"{vllm}.{name}")
            migration.note(NoteKind.DROPPED, f"{vllm}.{name}", "a server has one device, and never sleeps.")
    moved = {name: flag for name, flag in FLAGS_OF_THE_SERVER.items() if migration.has(f"{vllm}.{name}")}
    for name, flag in moved.items():
        value = migration.drop(f"{vllm}.{name}")
        migration.note(
            NoteKind.CHANGED, f"{vllm}.{name}", f"{as_yaml(value)} is for `coordexp rollout-server {flag}`."
        )
    migration.note(
        NoteKind.LOOK,
        f"{vllm}.server",
        "start the servers with `coordexp rollout-server` (runbooks/vllm_server.md); those of ms-swift are not "
        "understood. There prefixes are cached: --engine-args '{\"enable_prefix_caching\": true}'.",
    )


def _write_defaults(migration: Migration) -> None:
    """Every default of the research code's schema that differs from ours, where the file says nothing."""
    for path, theirs in _silent_defaults(migration).items():
        ours = default_of(path)
        if migration.has(path) or theirs == ours:
            continue
        migration.put(path, theirs)
        migration.note(NoteKind.DEFAULT, path, f"{as_yaml(theirs)}; ours is {as_yaml(ours)}.")


def _silent_defaults(migration: Migration) -> dict[str, Any]:
    if not migration.is_stage2:
        loss: dict[str, Any] = {"custom.coord_soft_ce_w1.enabled": False}
        if migration.get("custom.coord_soft_ce_w1.enabled"):
            loss["custom.coord_soft_ce_w1.gate_weight"] = 1.0
        return loss
    found: dict[str, Any] = {
        "rollout_matching.decode_batch_size": 1,
        "rollout_matching.max_new_tokens": 512,
        "rollout_matching.packing": False,
        "rollout_matching.eval_detection.enabled": True,
    }
    if migration.get("rollout_matching.eval_detection.enabled") is not False:
        found["rollout_matching.eval_detection.score_mode"] = "constant"
    if migration.get("rollout_matching.desc_monitor.enabled"):
        found["rollout_matching.desc_monitor.mode"] = "semantic"
    in_process = migration.get("rollout_matching.vllm.mode") != "server"
    if migration.get("rollout_matching.backend") != "hf" and in_process:
        found["rollout_matching.vllm.enable_prefix_caching"] = True
    if migration.variant == "stage2_two_channel":
        found |= {"stage2_ab.n_softctx_iter": 2, "stage2_ab.coord_ctx_embed_mode": "st"}
    return found


def default_of(path: str) -> Any:
    """Our default at a dotted path, None for a key without one."""
    model: Any = LaunchSections
    *above, last = path.split(".")
    for part in above:
        (model,) = models_in(model.model_fields[part].annotation)
    return model.model_fields[last].get_default(call_default_factory=True)

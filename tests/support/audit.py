"""A run file for `coordexp audit`, and a quick start of its short runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from support.processes import PLUGIN, run_train


def run_file(folder: Path, model: Path, *, plugins: Sequence[Path] = (), **settings: Any) -> Path:
    """A flat run file of a small CPU run."""
    flat = {
        "external_plugins": [str(path) for path in (PLUGIN, *plugins)],
        "ignore_args_error": True, "custom_trainer_variant": "stage1_coord",
        "model": str(model), "model_type": "qwen3_vl", "tuner_type": "full", "torch_dtype": "float32",
        "attn_impl": "sdpa", "freeze_vit": False, "freeze_aligner": False, "dataset": ["none.jsonl"],
        "max_length": 512, "strict": True, "load_from_cache_file": False, "lazy_tokenize": True,
        "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "learning_rate": 1.0e-3,
        "lr_scheduler_type": "constant", "gradient_checkpointing": False, "use_cpu": True, "fp16": False,
        "bf16": False, "check_model": False, "max_steps": 2, "output_dir": str(folder / "unused"), **settings,
    }  # fmt: skip
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(flat))
    return path


def start_warm(run_file: Path, words: Sequence[str], *, environment: Mapping[str, str], log: Path) -> int:
    """What `coordexp train` starts, in a warm process (see `support.warm`); as `coordexp.audit.subject.Start`."""
    done = run_train(run_file, words, **environment)
    log.write_text(done.stdout + done.stderr)
    return done.returncode

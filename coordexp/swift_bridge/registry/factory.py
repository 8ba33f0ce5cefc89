"""Make ms-swift build our trainer for supervised fine-tuning."""

from __future__ import annotations

from swift.trainers import TrainerFactory

SFT_TASK = "causal_lm"


def use_trainer(import_path: str) -> None:
    """Let `swift sft` construct the class at `import_path` (module.Class) in this process."""
    TrainerFactory.TRAINER_MAPPING[SFT_TASK] = import_path

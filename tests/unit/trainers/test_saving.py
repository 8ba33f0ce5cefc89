"""`training.save_delay_steps` and `save_last_epoch` on the HF Trainer's own loop, by the checkpoints that are left."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import Trainer, TrainerState, TrainingArguments

from coordexp.config.schema.training import Training
from coordexp.trainers.saving import SaveSchedule


class Line(torch.nn.Module):
    """y = w x, as a model of the Trainer."""

    def __init__(self) -> None:
        super().__init__()
        self.w = torch.nn.Parameter(torch.zeros(1))

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": (self.w * x - labels).square().mean()}


def saved_steps(folder: Path, strategy: str, settings: dict, *, steps: int = 7) -> list[int]:
    rows = [{"x": torch.tensor([1.0]), "labels": torch.tensor([2.0])}] * steps
    args = TrainingArguments(
        output_dir=str(folder), use_cpu=True, num_train_epochs=1, per_device_train_batch_size=1,
        save_strategy=strategy, save_steps=2, report_to="none", disable_tqdm=True, save_only_model=True,
    )  # fmt: skip
    args.max_epochs = (
        None  # ms-swift's flow callback, which replaces the HF Trainer's once imported, asks for it
    )
    Trainer(Line(), args, train_dataset=rows, callbacks=[SaveSchedule(Training(**settings))]).train()
    return sorted(int(path.name.split("-")[1]) for path in folder.glob("checkpoint-*"))


@pytest.mark.parametrize(
    ("strategy", "settings", "expected"),
    [
        ("steps", {}, [2, 4, 6, 7]),
        ("steps", {"save_delay_steps": 5}, [6, 7]),
        ("steps", {"save_last_epoch": False}, [2, 4, 6]),
        ("steps", {"save_last_epoch": True, "save_delay_steps": 100}, [7]),
        ("steps", {"save_delay_steps": 100}, []),
        ("no", {}, []),
        ("no", {"save_last_epoch": True}, [7]),
        ("epoch", {"save_last_epoch": True}, [7]),
        ("epoch", {"save_delay_steps": 8}, []),
    ],
)
def test_which_steps_are_saved(tmp_path: Path, strategy: str, settings: dict, expected: list[int]) -> None:
    assert saved_steps(tmp_path, strategy, settings) == expected


def test_before_the_delay_nothing_counts() -> None:
    schedule = SaveSchedule(Training(save_delay_steps=3, save_last_epoch=True))
    found = [
        (schedule.is_too_early(state), schedule.must_save(state))
        for state in (TrainerState(global_step=step, max_steps=4) for step in (2, 3, 4))
    ]
    assert found == [(True, False), (False, False), (False, True)]

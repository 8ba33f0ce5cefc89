"""ms-swift's SFT trainer with the seams our trainers use.

1. `plan_step(batches)`: called once per optimizer step with all its micro-batches, before the first forward; what it
   returns is trained on. `on_step(num_micro_steps)` is called just before it.
2. `compute_loss` of a subclass sees model inputs only; supervision travels in `SUPERVISION_KEYS`.
3. `window_metrics(mode)`: what a subclass adds to every log record, called on all ranks; `on_record` receives the
   finished record on the main process.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import torch
from swift.trainers import Seq2SeqTrainer
from swift.utils import use_hf_hub
from torch import Tensor, nn

from coordexp.swift_bridge.draws import DrawnDataset, with_draws
from coordexp.swift_bridge.saving.each_node import written_here
from coordexp.swift_bridge.saving.uploads import say_failed_uploads

# Keys of a collated batch that describe supervision or bookkeeping and are no argument of the model's forward.
SUPERVISION_KEYS = (
    "labels",
    "loss_scale",
    "channel",
    "text_position_ids",
    "compute_loss_func",
    "num_samples",
)


class SwiftTrainerBridge(Seq2SeqTrainer):
    """Adapts ms-swift's Seq2SeqTrainer; knows nothing of coordinates."""

    push_in_progress: Any = None  # the HF Trainer sets it on the rank that uploads

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        _keep_token_out_of_files(kwargs["args"])
        super().__init__(*args, **kwargs)

    def plan_step(self, batches: list[Any]) -> list[Any]:
        """From all micro-batches of the coming optimizer step on this rank to as many entries for `training_step`.

        Collectives are allowed: all ranks call it.
        """
        return batches

    def on_step(self, num_micro_steps: int) -> None:
        """An optimizer step of so many micro-batches is about to be planned. Called on every rank."""

    def window_metrics(self, mode: str) -> dict[str, float]:
        """Metrics gathered since the last call for `mode` ("train" or "eval"). Called on every rank."""
        return {}

    def on_record(self, mode: str, record: dict[str, float]) -> None:
        """A complete log record, on the main process only."""

    def get_batch_samples(
        self, epoch_iterator: Iterator[dict[str, Any]], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | int | None]:
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if batches:
            self.on_step(len(batches))
            batches = self.plan_step(batches)
        return batches, num_items

    def get_train_dataloader(self, skip_batches: int = 0) -> Any:
        loader = super().get_train_dataloader(skip_batches)
        if isinstance(self.train_dataset, DrawnDataset):
            loader = with_draws(loader, self.args, skip_batches)
        return loader

    def get_use_logits_to_keep(self, default_value: bool = True) -> bool:
        # Rows are chosen exactly, per token, by coordexp.head.call.
        return False

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        with written_here(self.unwrapped_model) if self.args.save_on_each_node else nullcontext():
            super()._save(output_dir, state_dict)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        mode = "eval" if any(key.startswith("eval_") for key in logs) else "train"
        # In place: evaluate() hands this very dict on to best-checkpoint selection.
        logs.update(self.window_metrics(mode))
        super().log(logs, *args, **kwargs)
        if self.is_world_process_zero():
            self.on_record(mode, logs)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        self._say_failed_uploads()
        super()._push_from_checkpoint(checkpoint_folder)

    def _finish_current_push(self) -> None:
        super()._finish_current_push()
        self._say_failed_uploads()

    def _say_failed_uploads(self) -> None:
        if self.push_in_progress is not None:
            say_failed_uploads(self.push_in_progress.jobs)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Tells the callbacks where the uploaded model lies, instead of writing the HF Trainer's draft."""
        self.callback_handler.call_event(
            "on_push_begin", self.args, self.state, self.control, model_in=self.args.output_dir
        )

    def announce_evaluation(self, metrics: dict[str, float]) -> None:
        """Tell the callbacks of an evaluation that did not run through the HF Trainer's own loop."""
        self.control: Any = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)

    @property
    def unwrapped_model(self) -> nn.Module:
        model: nn.Module = self.accelerator.unwrap_model(self.model)
        return model


def _keep_token_out_of_files(args: Any) -> None:
    """Move `hub_token` into the environment of this process, where the hub's client finds it.

    The HF Trainer writes its arguments as they are to training_args.bin, which is uploaded to that hub.
    """
    if args.hub_token:
        os.environ["HF_TOKEN" if use_hf_hub() else "MODELSCOPE_API_TOKEN"] = args.hub_token
        args.hub_token = None

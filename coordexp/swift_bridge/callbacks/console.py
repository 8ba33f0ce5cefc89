"""What a run shows on its console: a progress bar, and the lines it is told. ms-swift prints whole records."""

from __future__ import annotations

import os
import time
from typing import Any

from swift.trainers.patcher import PrinterCallbackNew, ProgressCallbackNew, add_train_message
from swift.utils import append_to_jsonl


class ConsoleLines(ProgressCallbackNew):
    """In place of ms-swift's own; logging.jsonl is written as it does."""

    def __init__(self, *, has_bar: bool) -> None:
        super().__init__()
        self._has_bar = has_bar

    def say(self, lines: str) -> None:
        """Print, above the progress bar if there is one."""
        if self.training_bar is None:
            print(lines, flush=True)
        else:
            self.training_bar.write(lines)
            self.training_bar.refresh()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._has_bar:
            super().on_train_begin(args, state, control, **kwargs)
        self.start_step, self.start_time = state.global_step, time.time()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.training_bar is not None:
            super().on_step_end(args, state, control, **kwargs)

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._has_bar:
            super().on_prediction_step(args, state, control, **kwargs)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.training_bar is not None:
            super().on_train_end(args, state, control, **kwargs)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        add_train_message(logs, state, self.start_time, self.start_step)
        if state.is_world_process_zero:
            append_to_jsonl(os.path.join(args.output_dir, "logging.jsonl"), logs)


def use_console_lines(trainer: Any) -> ConsoleLines:
    """Let a trainer print no records; what it shall print instead is told to the result."""
    has_bar = not trainer.args.disable_tqdm
    trainer.remove_callback(ProgressCallbackNew if has_bar else PrinterCallbackNew)
    lines = ConsoleLines(has_bar=has_bar)
    trainer.add_callback(lines)
    return lines

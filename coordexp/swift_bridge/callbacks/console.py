"""What a run shows on its console: a progress bar, and one line per record. ms-swift prints the whole record."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from typing import Any

from swift.trainers.patcher import PrinterCallbackNew, ProgressCallbackNew, add_train_message
from swift.utils import append_to_jsonl

LineOf = Callable[[int, int, Mapping[str, object]], str]
"""(step, last step, record) -> the line."""


class ConsoleLines(ProgressCallbackNew):
    """In place of ms-swift's own; logging.jsonl is written as it does. line_of: see `LineOf`."""

    def __init__(self, line_of: LineOf, *, has_bar: bool) -> None:
        super().__init__()
        self._line_of, self._has_bar = line_of, has_bar

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
        if not state.is_world_process_zero:
            return
        append_to_jsonl(os.path.join(args.output_dir, "logging.jsonl"), logs)
        line = self._line_of(state.global_step, state.max_steps, logs)
        if self.training_bar is None:
            print(line, flush=True)
        else:
            self.training_bar.write(line)
            self.training_bar.refresh()


def use_console_lines(trainer: Any, line_of: LineOf) -> None:
    """Let a trainer show `line_of` each record, under its progress bar if it has one."""
    has_bar = not trainer.args.disable_tqdm
    trainer.remove_callback(ProgressCallbackNew if has_bar else PrinterCallbackNew)
    trainer.add_callback(ConsoleLines(line_of, has_bar=has_bar))

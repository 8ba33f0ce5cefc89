"""Experiment trackers (`report_to`): the payload under its own names, at its step, in one run also after a resume.

The callbacks of transformers (and SwanLab's own) open, configure and close their runs; they would log each record
under other names (`train/...`). Here they are told the payload instead, as it stands in metrics.jsonl, and the
resolved configuration as a file of the run.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image
from transformers import TrainerCallback
from transformers.integrations.integration_utils import TensorBoardCallback, TrackioCallback, WandbCallback

from coordexp.config.run.resolved import RESOLVED_FILE

TRACKERS_KEY = "CoordExpTrackers"
"""Where the ids of a tracker's runs live in trainer_state.json."""
CONFIG_NAME = "resolved_config"
X_AXIS = "train/global_step"
"""What W&B draws everything over, as transformers declares it."""


class Tracker(Protocol):
    """A callback that takes payloads on the main process."""

    def send(self, metrics: Mapping[str, float], step: int) -> None:
        """The metrics of a payload."""

    def show(self, tag: str, pictures: Sequence[Image.Image], captions: Sequence[str], step: int) -> None:
        """Pictures under `tag` at optimizer step `step`; nothing before the tracker has started."""

    def run_id(self) -> str | None:
        """By which the tracker goes on with the run; None where it needs none, or has no run yet."""


class TensorBoardPayloads(TensorBoardCallback):
    """Event files; those of a resumed run hide what was logged after its checkpoint."""

    def __init__(self, config: Path) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._config = config

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero and state.global_step > 0 and self.logging_dir is not None:
            from torch.utils.tensorboard import SummaryWriter

            self.tb_writer = SummaryWriter(self.logging_dir, purge_step=state.global_step + 1)
        super().on_train_begin(args, state, control, **kwargs)  # type: ignore[no-untyped-call]
        if self.tb_writer is not None:
            self.tb_writer.add_text(CONFIG_NAME, _as_markdown(self._config), state.global_step)

    def on_log(self, *args: Any, **kwargs: Any) -> None:
        """`send` logs."""

    def send(self, metrics: Mapping[str, float], step: int) -> None:
        if self.tb_writer is not None:
            for key, value in metrics.items():
                self.tb_writer.add_scalar(key, value, step)
            self.tb_writer.flush()

    def show(self, tag: str, pictures: Sequence[Image.Image], captions: Sequence[str], step: int) -> None:
        if self.tb_writer is not None:
            for index, picture in enumerate(pictures):
                pixels_HW3 = np.asarray(picture.convert("RGB"))
                self.tb_writer.add_image(f"{tag}/{index:02d}", pixels_HW3, step, dataformats="HWC")
            self.tb_writer.flush()

    def run_id(self) -> str | None:
        return None


class WandbPayloads(WandbCallback):
    """A run of Weights & Biases; a resumed one goes on under the same id."""

    def __init__(self, config: Path) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._config = config

    def setup(self, args: Any, state: Any, model: Any, **kwargs: Any) -> None:
        earlier = _earlier_id(state, "wandb")
        if state.is_world_process_zero and self._wandb.run is None and earlier is not None:
            self._wandb.init(
                project=os.getenv("WANDB_PROJECT", "huggingface"),
                name=args.run_name,
                id=earlier,
                resume="allow",
            )
        super().setup(args, state, model, **kwargs)  # type: ignore[no-untyped-call]
        if state.is_world_process_zero:
            artifact = self._wandb.Artifact(f"config-{self._wandb.run.id}", type="config")
            artifact.add_file(str(self._config))
            self._wandb.run.log_artifact(artifact)

    def on_log(self, *args: Any, **kwargs: Any) -> None:
        """`send` logs."""

    def send(self, metrics: Mapping[str, float], step: int) -> None:
        if self._wandb.run is not None:
            self._wandb.log({**metrics, X_AXIS: step})

    def show(self, tag: str, pictures: Sequence[Image.Image], captions: Sequence[str], step: int) -> None:
        if self._initialized:
            pairs = zip(pictures, captions, strict=True)
            images = [self._wandb.Image(picture, caption=caption) for picture, caption in pairs]
            self._wandb.log({tag: images, X_AXIS: step})

    def run_id(self) -> str | None:
        return None if self._wandb.run is None else str(self._wandb.run.id)


class TrackioPayloads(TrackioCallback):
    """A run of Trackio; one of the same `run_name` goes on."""

    def __init__(self, config: Path) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._config = config

    def setup(self, args: Any, state: Any, model: Any, **kwargs: Any) -> None:
        super().setup(args, state, model, **kwargs)  # type: ignore[no-untyped-call]
        if state.is_world_process_zero:
            self._trackio.log_artifact(self._config, name=CONFIG_NAME, type="config")

    def on_log(self, *args: Any, **kwargs: Any) -> None:
        """`send` logs."""

    def send(self, metrics: Mapping[str, float], step: int) -> None:
        if self._initialized:
            self._trackio.log(dict(metrics), step=step)

    def show(self, *args: Any, **kwargs: Any) -> None:
        """No pictures here."""

    def run_id(self) -> str | None:
        return None


def swanlab_payloads(config: Path, options: Mapping[str, Any]) -> Any:
    """A callback of SwanLab that takes payloads; a resumed run goes on under the same id.

    options: ms-swift's arguments, for `swanlab_*`.
    """
    import swanlab
    from swanlab.integration.transformers import SwanLabCallback

    chosen = {
        "project": options.get("swanlab_project"),
        "workspace": options.get("swanlab_workspace"),
        "name": options.get("swanlab_exp_name"),
        # ms-swift's default stands for "as SWANLAB_MODE says"
        "mode": None if options.get("swanlab_mode") == "cloud" else options.get("swanlab_mode"),
    }
    given = {name: value for name, value in chosen.items() if value is not None}

    class SwanLabPayloads(SwanLabCallback):  # type: ignore[misc]
        def setup(self, args: Any, state: Any, model: Any = None) -> None:
            if state.is_world_process_zero and self._get_active_run() is None:
                earlier = _earlier_id(state, "swanlab")
                resumed = {} if earlier is None else {"id": earlier, "resume": "allow"}
                own = {"config": {CONFIG_NAME: json.loads(config.read_text(encoding="utf-8"))}}
                swanlab.init(callbacks=[self], **{"name": args.run_name, **given, **own, **resumed})
            super().setup(args, state, model)

        def on_log(self, *args: Any, **kwargs: Any) -> None:
            """`send` logs."""

        def on_evaluate(self, *args: Any, **kwargs: Any) -> None:
            """An evaluation is a payload too."""

        def send(self, metrics: Mapping[str, float], step: int) -> None:
            if self._get_active_run() is not None:
                swanlab.log(dict(metrics), step=step)

        def show(self, *args: Any, **kwargs: Any) -> None:
            """No pictures here."""

        def run_id(self) -> str | None:
            run = self._get_active_run()
            return None if run is None else str(run.id)

    return SwanLabPayloads()


_REPLACED: dict[type[TrainerCallback], tuple[str, Any]] = {
    TensorBoardCallback: ("tensorboard", TensorBoardPayloads),
    WandbCallback: ("wandb", WandbPayloads),
    TrackioCallback: ("trackio", TrackioPayloads),
}


def use_payloads(trainer: Any, options: Mapping[str, Any]) -> dict[str, Tracker]:
    """Put the trackers of this module in the place of those that a trainer was given; by name.

    options: ms-swift's arguments.
    """
    config = Path(trainer.args.output_dir) / RESOLVED_FILE
    found: dict[str, Tracker] = {}
    for given in list(trainer.callback_handler.callbacks):
        if type(given).__name__ == "SwanLabCallback":  # transformers' and SwanLab's own
            name, tracker = "swanlab", swanlab_payloads(config, options)
        elif type(given) in _REPLACED:
            name, make = _REPLACED[type(given)]
            tracker = make(config)
        else:
            continue
        trainer.remove_callback(given)
        trainer.add_callback(tracker)
        found[name] = tracker
    return found


def ids_of(trackers: Mapping[str, Tracker]) -> dict[str, Any]:
    """What a checkpoint keeps."""
    ids = {name: tracker.run_id() for name, tracker in trackers.items()}
    return {"args": {}, "attributes": {name: found for name, found in ids.items() if found is not None}}


def _earlier_id(state: Any, name: str) -> str | None:
    """Id of the run that a resumed one goes on with."""
    kept = state.stateful_callbacks.get(TRACKERS_KEY)
    return None if kept is None else kept["attributes"].get(name)


def _as_markdown(config: Path) -> str:
    return "    " + config.read_text(encoding="utf-8").replace("\n", "\n    ")

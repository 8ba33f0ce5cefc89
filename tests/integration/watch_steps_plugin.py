"""A second ms-swift plugin for tests: watches the optimizer steps of a run, and spoils what it is asked to.

--callbacks forbid_sync     a host sync asked for by our code inside an optimizer step raises, but in trainers/finite.py
--callbacks spoil           the hidden states of step 2 are NaN; WEIGHTS_FILE gets a checksum of the weights per step
SPOIL_TYPES=1               the labels of the first typed batch do not line up with its samples
"""

import os
import sys
from pathlib import Path

import torch
from swift.callbacks import callbacks_map
from transformers import TrainerCallback

import coordexp
from coordexp.data.row_types import RowTyper

SYNCS = ("item", "cpu", "tolist", "numpy", "__bool__", "__int__", "__float__", "__index__")
OURS, TORCH = str(Path(coordexp.__file__).parent), str(Path(torch.__file__).parent)
THE_ONE_SYNC_OF_A_STEP = str(Path(OURS) / "trainers" / "finite.py")


class HostSyncError(Exception):
    pass


class ForbidSync(TrainerCallback):
    def __init__(self, args, trainer):
        self.originals = {name: getattr(torch.Tensor, name) for name in SYNCS}

    def on_step_begin(self, *args, **kwargs):
        for name, original in self.originals.items():
            setattr(torch.Tensor, name, forbidden(name, original))

    def on_step_end(self, *args, **kwargs):
        for name, original in self.originals.items():
            setattr(torch.Tensor, name, original)


def forbidden(name, original):
    def guarded(tensor, *args, **kwargs):
        frame = sys._getframe(1)
        while frame.f_code.co_filename.startswith(TORCH):
            frame = frame.f_back
        file = frame.f_code.co_filename
        if file.startswith(OURS) and file != THE_ONE_SYNC_OF_A_STEP:
            raise HostSyncError(f"Tensor.{name} in {Path(file).name}:{frame.f_lineno}")
        return original(tensor, *args, **kwargs)

    return guarded


class Spoil(TrainerCallback):
    def __init__(self, args, trainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        norm = self.trainer.unwrapped_model.model.language_model.norm
        norm.register_forward_hook(lambda _m, _a, out: out * float("nan") if self.spoils(state) else None)
        self.note()

    def spoils(self, state):
        return state.global_step == 1 and self.trainer.model.training

    def on_step_end(self, *args, **kwargs):
        self.note()

    def note(self):
        total = sum(p.detach().double().abs().sum().item() for p in self.trainer.unwrapped_model.parameters())
        with open(os.environ["WEIGHTS_FILE"], "a") as file:
            file.write(f"{total!r}\n")


def spoil_types():
    original, calls = RowTyper.labels_and_types, []

    def spoiled(self, samples):
        calls.append(samples)
        return original(self, samples)[:, 1 if len(calls) <= 2 else 0 :]

    RowTyper.labels_and_types = spoiled


if os.environ.get("SPOIL_TYPES"):
    spoil_types()
callbacks_map.update(forbid_sync=ForbidSync, spoil=Spoil)

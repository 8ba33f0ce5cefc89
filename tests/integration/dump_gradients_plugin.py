"""A second ms-swift plugin for tests: `--callbacks dump_gradients` saves the gradient of the first optimizer step.

DUMP_GRADIENTS names the file; every rank adds its rank to the name and records how many ranks there are.
"""

import os

import torch
from swift.callbacks import callbacks_map
from transformers import TrainerCallback


class DumpGradients(TrainerCallback):
    def __init__(self, args, trainer):
        self.trainer = trainer

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if state.global_step > 0:
            return
        model = self.trainer.accelerator.unwrap_model(model)
        dump = {
            "num_processes": self.trainer.accelerator.num_processes,
            "gradients": {
                name: p.grad.detach().clone() for name, p in model.named_parameters() if p.grad is not None
            },
        }
        torch.save(dump, f"{os.environ['DUMP_GRADIENTS']}.rank{args.process_index}")


callbacks_map["dump_gradients"] = DumpGradients

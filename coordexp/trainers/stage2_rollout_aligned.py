"""Stage 2, rollout-aligned: every step teaches on the model's own answers.

The model answers each sample of the step; the answer is parsed strictly and matched with the ground truth; the model is
then teacher-forced on its own prefix plus the objects it missed. One forward per pack, one update a step.
"""

from __future__ import annotations

from collections.abc import Sequence

from coordexp.data.raw_samples import RawSample
from coordexp.targets.sample import EncodedSample
from coordexp.trainers.channel_schedule import rollout_seed_base
from coordexp.trainers.stage2 import Stage2Trainer


class Stage2RolloutAlignedTrainer(Stage2Trainer):
    """Trainer variant `stage2_rollout_aligned`."""

    def plan_groups(self, raws: Sequence[RawSample]) -> list[list[EncodedSample]]:
        return self.roll_out(raws, seed_base=rollout_seed_base(self.args.seed, int(self.state.global_step)))

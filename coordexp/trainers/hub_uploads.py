"""What a run that is uploaded while it trains (`push_to_hub`) does for its uploads."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from coordexp.config.run.resolved import RESOLVED_FILE
from coordexp.errors import CoordExpError
from coordexp.files import read_json, while_uploaded
from coordexp.handover.card import CARD, write_card
from coordexp.handover.facts import CardFacts, facts_of

logger = logging.getLogger(__name__)


class HubUploads(TrainerCallback):
    """Keeps unfinished files out of uploads, and writes the model card in place of the HF Trainer's draft."""

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if args.push_to_hub:
            while_uploaded(args.output_dir)

    def on_push_begin(
        self,
        args: Any,
        state: TrainerState,
        control: TrainerControl,
        model_in: str | None = None,
        **kwargs: Any,
    ) -> None:
        """Write README.md into the run folder.

        model_in: the folder of the weights that are uploaded; None: the checkpoint of this step, if there is one.
        """
        run = Path(args.output_dir)
        checkpoint = Path(model_in) if model_in else run / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        if not (state.is_world_process_zero and checkpoint.is_dir()):
            return
        try:
            write_card(card_facts(run, checkpoint, args.hub_model_id), run / CARD)
        except (CoordExpError, OSError) as error:  # an upload without a card is better than a run that ends
            logger.warning("coordexp: the model is uploaded without a card: %s", error)


def card_facts(run: Path, checkpoint: Path, hub_model_id: str | None) -> CardFacts:
    """What is known of a model while it trains; its evaluations come later (`coordexp model card`)."""
    name = (hub_model_id or run.resolve().name).rpartition("/")[2]
    return facts_of(checkpoint, resolved=read_json(run / RESOLVED_FILE), name=name)

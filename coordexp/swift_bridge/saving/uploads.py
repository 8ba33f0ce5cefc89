"""Uploads of checkpoints that run beside training: what the HF Trainer drops, the reason why one failed, is said."""

from __future__ import annotations

import logging
from concurrent.futures import Future
from typing import Any

logger = logging.getLogger(__name__)


def say_failed_uploads(jobs: list[Future[Any]]) -> None:
    """Warn of every upload that ended in an error and take it off `jobs`; what runs or went well stays there."""
    ended = [job for job in jobs if job.done() and not job.cancelled()]
    for job in ended:
        error = job.exception()
        if error is not None:
            jobs.remove(job)
            logger.warning(
                "coordexp: a checkpoint was not uploaded to the hub (%s). It is complete in the run folder; the next"
                " checkpoint is uploaded again, and the end of training waits for its own upload.",
                error,
            )

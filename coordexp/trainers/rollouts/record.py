"""What a training step logs of its rollouts, and what it shows to people."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from coordexp.config.schema.rollout import RolloutMatching
from coordexp.telemetry.desc_monitor import DescMonitor
from coordexp.telemetry.dumps import DumpSample, MonitorDumps
from coordexp.trainers.rollouts.answers import RolledOut
from coordexp.trainers.rollouts.dumps import dump_sample
from coordexp.trainers.rollouts.eval import matched_descs
from coordexp.trainers.rollouts.metrics import MetricEntries, channel_b_metrics, part_metrics, rollout_metrics


class RolloutRecord:
    """Numbers of a step's rollouts, on every rank; monitor dumps, where a folder is given.

    Arguments:
        fn_desc_weight: cross-entropy weight of descriptions of missed objects.
        dump_dir: of the dumps; None on ranks that write none.
        logging_steps: optimizer steps between logs.
    """

    def __init__(
        self,
        settings: RolloutMatching,
        desc_monitor: DescMonitor,
        tokenizer: Any,
        *,
        fn_desc_weight: float,
        dump_dir: Path | None,
        logging_steps: int = 1,
    ) -> None:
        self._settings, self._desc_monitor, self._tokenizer = settings, desc_monitor, tokenizer
        self._fn_desc_weight = fn_desc_weight
        self._dumps = (
            None
            if dump_dir is None
            else MonitorDumps(settings.monitor_dump, dump_dir, logging_steps=logging_steps)
        )

    def __call__(self, rolled_out: RolledOut, step: int) -> MetricEntries:
        """Entries for the log; a few rollouts are dumped on steps that ask for it."""
        outcomes = rolled_out.outcomes
        entries = rollout_metrics(
            outcomes,
            self._settings,
            generate_s=rolled_out.generate_s,
            parse_match_s=rolled_out.parse_match_s,
            encode_s=rolled_out.encode_s,
            fn_desc_weight=self._fn_desc_weight,
        )
        entries |= channel_b_metrics(outcomes)
        entries |= part_metrics(outcomes, [answer.raw.part for answer in rolled_out.answers])
        if self._desc_monitor.wants(step):
            entries |= self._desc_monitor.compare(matched_descs(rolled_out.answers)).entries()
        if self._dumps is not None and self._dumps.wants(step):
            self._dumps.submit(step, self._shown(rolled_out))
        return entries

    def close(self) -> None:
        """Finish what is being written."""
        if self._dumps is not None:
            self._dumps.close()

    def _shown(self, rolled_out: RolledOut) -> list[DumpSample]:
        most = self._settings.monitor_dump.max_samples
        return [
            dump_sample(
                outcome,
                answer.raw.objects,
                self._tokenizer,
                sample_id=answer.raw.sample_id,
                image=next(iter(answer.raw.images), None),
            )
            for answer, outcome in zip(rolled_out.answers[:most], rolled_out.outcomes[:most], strict=True)
        ]

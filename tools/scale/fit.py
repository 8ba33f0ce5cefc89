"""Rates of this machine from a few short runs: what their steps did, and what each part of them cost."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.optimize import nnls

from coordexp.errors import ConfigError
from scale.rates import Rates
from scale.shapes import CPU_BLOCK, FP32, ModelShape, Pass
from scale.step import Rollouts, Run, step_time
from scale.trial import ROLLOUT_ALIGNED, Outcome, Trial, run_trial
from scale.work import Training, Work, backward_work, decode_work, forward_work, prefill_work, update_bytes

CALIBRATION = (
    Trial("small", objects=1, batch=2),
    Trial("long", objects=12, side=96, batch=4, steps=6),
    Trial("wide", size={"text_hidden": 320, "text_intermediate": 1024, "text_layers": 2}),
    Trial("answers of 8", stage=ROLLOUT_ALIGNED, new_tokens=8, steps=6),
    Trial("answers of 24", stage=ROLLOUT_ALIGNED, new_tokens=24, steps=6),
)
"""Lengths 66 to 372, widths 160 and 320, two lengths of answers; everything else is left to the check."""


@dataclass(frozen=True)
class Measured:
    """A trial, the model it trained, and what it cost."""

    trial: Trial
    shape: ModelShape
    outcome: Outcome

    @property
    def how(self) -> Training:
        return Training(FP32, self.trial.checkpointing, not self.trial.frozen_vision)

    def passes(self, channel: str | None = None) -> tuple[Pass, ...]:
        """Forwards of a step of that channel: lengths are those of the run's own plan."""
        patches = (self.trial.side // self.shape.patch) ** 2
        return tuple(_pass(told, patches) for told in self.step(channel)["forwards"])

    def step(self, channel: str | None = None) -> Mapping[str, Any]:
        return next(s for s in self.outcome.steps if channel in (None, s["channel"]))

    def run(self, channel: str | None = None) -> Run:
        """One rank's step, as the model of step time takes it."""
        trial, step = self.trial, self.step(channel)
        asked = step["answers"]
        patches = (trial.side // self.shape.patch) ** 2
        rollouts = (
            Rollouts(len(asked), asked[0][0], max(new for _, new in asked), trial.decode_batch, patches)
            if asked
            else None
        )
        passes = self.passes(channel)
        samples = trial.batch * trial.accumulate
        return Run(
            self.shape, passes, self.how, gpus=trial.ranks, graphs=trial.forwards if channel == "A" else 1,
            rollouts=rollouts, samples=samples, sample_tokens=sum(p.tokens for p in passes) / samples,
        )  # fmt: skip


def _pass(told: Mapping[str, Any], patches: int) -> Pass:
    rows, tokens = told["shape"]
    number, supervised = told["samples"], told["text_rows"] + told["coord_rows"]
    if rows == 1 and number > 1:
        lengths = tuple(tokens * (i + 1) // number - tokens * i // number for i in range(number))
        return Pass.packed(lengths, supervised, coord_rows=told["coord_rows"], patches=patches, masked=True)
    return Pass.padded(
        (tokens,) * rows, supervised, coord_rows=told["coord_rows"], patches=patches, block=CPU_BLOCK
    )


def measure(trial: Trial, folder: Path, *, reuse: bool = False) -> Measured:
    """Run a trial in a folder of its own. reuse: what a run left there counts, if there is any."""
    place = folder / trial.name.replace(" ", "_")
    outcome = run_trial(trial, place, reuse=reuse)
    config = json.loads((place / "model" / "config.json").read_text(encoding="utf-8"))
    return Measured(trial, ModelShape.from_config(trial.name, config), outcome)


def fitted(calibration: Sequence[Measured]) -> Rates:
    """The rates under which the predicted parts of these runs are nearest to what they cost, in relative terms.

    Least squares with no rate below zero, in three parts: kernels from forward and backward passes, the host from
    loading, decoding from steps with answers.

    Raises:
        ConfigError: fewer runs than unknowns.
    """
    if len(calibration) < 3 or not any(one.trial.has_rollouts for one in calibration):
        raise ConfigError("calibration: at least two runs without and one with answers are needed.")
    kernels = _kernels(calibration)
    update = np.median(
        [update_bytes(one.shape.parameters) / one.outcome.seconds("optimizer") for one in calibration]
    )
    plain = [one for one in calibration if not one.trial.has_rollouts]
    host = _solve(
        [(1.0, run.samples, run.samples * run.sample_tokens) for run in (one.run() for one in plain)],
        [one.outcome.seconds("data") + one.outcome.seconds("other") for one in plain],
    )
    names = (
        "products", "attention", "traffic", "scores", "update", "launch_s", "decode_launch_s", "step_s", "sample_s",
        "token_s",
    )  # fmt: skip
    sources = {name: f"fitted to {len(calibration)} runs, {machine()}" for name in names}
    found = replace(
        kernels, update=float(update), step_s=host[0], sample_s=host[1], token_s=host[2], sources=sources
    )
    return _with_decoding(found, [one for one in calibration if one.trial.has_rollouts])


def _kernels(calibration: Sequence[Measured]) -> Rates:
    """Of the device alone. What the runs cannot tell from other work costs nothing of its own."""
    rows, seconds = [], []
    for one in calibration:
        for phase, work_of in (("forward", forward_work), ("backward", backward_work)):
            work = sum((work_of(one.shape, each, one.how) for each in one.passes()), Work())
            rows.append((work.products, work.attention, work.traffic, work.scores, work.launches))
            seconds.append(one.outcome.seconds(phase))
    costs = _solve(rows, seconds)
    products, attention, traffic, scores = (float("inf") if cost == 0 else 1 / cost for cost in costs[:4])
    return Rates(products, attention, traffic, scores, float("inf"), launch_s=costs[4])


def _with_decoding(rates: Rates, calibration: Sequence[Measured]) -> Rates:
    """The cost of a kernel of decoding: what answers took beyond encoding, reading the questions and the arithmetic."""
    launches, seconds = [], []
    for one in calibration:
        told = one.run().rollouts
        assert told is not None
        prompts = Pass.padded((told.prompt,) * told.questions, 0, patches=told.patches)
        prefill = prefill_work(one.shape, prompts, one.how)
        known = prefill.seconds(rates, launch_s=0.0)
        known += told.questions * (rates.sample_s + told.prompt * rates.token_s)
        token = decode_work(one.shape, told.questions, told.prompt + told.new_tokens / 2, width=FP32)
        known += told.new_tokens * token.seconds(rates, launch_s=0.0)
        launches.append((told.new_tokens * token.launches + prefill.launches,))
        seconds.append(max(0.0, one.outcome.seconds("other") - known))
    return replace(rates, decode_launch_s=_solve(launches, seconds)[0])


def _solve(rows: Sequence[Sequence[float]], seconds: Sequence[float]) -> list[float]:
    """Non-negative cost of a unit of each column, by relative least squares."""
    matrix, wanted = np.asarray(rows, dtype=float), np.asarray(seconds, dtype=float)
    scale = matrix.max(axis=0)
    scale[scale == 0] = 1.0
    costs, _ = nnls(matrix / np.maximum(wanted, 1e-9)[:, None] / scale, np.ones(len(wanted)))
    return [float(cost) for cost in costs / scale]


def machine() -> str:
    """This one in a few words."""
    names = [line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, 1 thread, torch {torch.__version__}"


def load() -> str:
    """How busy it is: the mean number of running processes over the last minute, and its cores."""
    return f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores"


def _lines(path: str) -> list[str]:
    return Path(path).read_text(encoding="utf-8").splitlines() if Path(path).is_file() else []


def predicted_seconds(one: Measured, rates: Rates, channel: str | None = None) -> dict[str, float]:
    """Parts of a step of the trial's run, and `total`."""
    found = step_time(one.run(channel), rates)
    return {**found.parts(), "total": found.total}

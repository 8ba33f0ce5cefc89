"""What is audited: a checkpoint or a run file, some records, and a few steps of a real run on them.

The run goes through `coordexp train` in a process of its own, with the data loader, shuffling, packing and ranks of the
recipe; it writes its step plans (`debug.step_dumps`), and everything else is read off those.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import yaml

from coordexp.codec.coord_vocab import CoordVocab
from coordexp.codec.forms.base import AnswerForm
from coordexp.codec.forms.choose import form_of
from coordexp.codec.records import Record, read_jsonl
from coordexp.config import load_run_config
from coordexp.config.run.resolved import RESOLVED_FILE, flat_of_resolved
from coordexp.config.schema.answer_form import form_name
from coordexp.errors import EXIT_BAD_INPUT, ConfigError, CoordExpError
from coordexp.files import read_json, write_text
from coordexp.metrics.keys_run import LOSS
from coordexp.metrics.sinks import METRICS_FILE
from coordexp.trainers.step.dump import DUMP_FOLDER, read_plans

LOG_TAIL = 3000
SHORT = (
    "--logging_steps", "1", "--eval_strategy", "no", "--load_best_model_at_end", "false", "--report_to", "none",
    "--save_strategy", "steps", "--save_steps", "1", "--save_only_model", "true", "--save_total_limit", "1000",
    "--add_version", "false", "--warmup_ratio", "0", "--warmup_steps", "0", "--lora_dropout", "0",
)  # fmt: skip
"""Every step is logged and saved; the first one moves the weights; no forward is random."""
RUN_ONLY = frozenset({"resume_from_checkpoint", "output_dir", "val_dataset", "dataset", "max_steps"})


@dataclass(frozen=True)
class ShortRun:
    """A few steps on the audited data.

    plans: step dumps by step and rank.  payloads: metrics of each step.  config: resolved_config.json.
    """

    folder: Path
    num_ranks: int

    @cached_property
    def plans(self) -> list[dict[str, Any]]:
        return read_plans(self.folder / DUMP_FOLDER)

    @cached_property
    def payloads(self) -> dict[int, dict[str, float]]:
        lines = (self.folder / METRICS_FILE).read_text(encoding="utf-8").splitlines()
        records = [json.loads(line) for line in lines]
        steps = [one for one in records if one.get("mode") == "train" and LOSS in one["metrics"]]
        return {one["global_step"]: one["metrics"] for one in steps}

    @cached_property
    def config(self) -> dict[str, Any]:
        found: dict[str, Any] = read_json(self.folder / RESOLVED_FILE, error=ConfigError)
        return found

    @cached_property
    def form(self) -> AnswerForm:
        """How the run's answers are written."""
        custom = self.config["custom"]
        name = form_name(custom["answer_format"], custom["coord_tokens"]["enabled"])
        return form_of(name, custom["object_field_order"])


class Start(Protocol):
    """Runs `coordexp train RUN_FILE WORDS` to its end, with what it prints in `log`, and gives its exit code."""

    def __call__(
        self, run_file: Path, words: Sequence[str], *, environment: Mapping[str, str], log: Path
    ) -> int: ...


def start_process(run_file: Path, words: Sequence[str], *, environment: Mapping[str, str], log: Path) -> int:
    """In a process of its own."""
    command = [sys.executable, "-m", "coordexp.cli.main", "train", str(run_file), *words]
    with log.open("w", encoding="utf-8") as file:
        done = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, env=environment, check=False)
    return done.returncode


@dataclass(frozen=True)
class Subject:
    """Everything the checks look at.

    run_file: what the short runs train.  data: at most the records asked for, image paths made absolute.
    start: how a short run is started.
    """

    run_file: Path
    model: Path
    data: Path
    overrides: tuple[str, ...]
    work: Path
    start: Start = start_process

    @cached_property
    def records(self) -> list[Record]:
        return read_jsonl(self.data, require_images=True)

    @cached_property
    def tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.model)

    def coord_ids(self, form: AnswerForm) -> tuple[int, ...]:
        """The coordinate tokens that a form uses, in bin order; none where it writes numbers."""
        return CoordVocab.from_tokenizer(self.tokenizer).ids if form.has_coord_tokens else ()

    def train(self, name: str, *, steps: int, num_ranks: int = 1, extra: Sequence[str] = ()) -> ShortRun:
        """`steps` optimizer steps of the run file on the data.

        extra: further flags.

        Raises:
            ConfigError: the settings do not go together.  CoordExpError: the run fails. With the end of its log.
        """
        folder = self.work / name
        flags = [*SHORT, "--max_steps", str(steps), "--output_dir", str(folder)]
        flags += ["--set", f"debug.step_dumps={steps}", "--set", "debug.enabled=true", *extra]
        env = {**os.environ, "HF_HUB_OFFLINE": "1"}
        if num_ranks > 1:
            env |= {"NPROC_PER_NODE": str(num_ranks)}
        log = self.work / f"{name}.log"
        code = self.start(self.run_file, [*self.overrides, *flags], environment=env, log=log)
        if code:
            tail = log.read_text(encoding="utf-8")[-LOG_TAIL:]
            kind = ConfigError if code == EXIT_BAD_INPUT else CoordExpError
            raise kind(f"the short run failed with exit status {code}; its log ends\n{tail}")
        return ShortRun(folder, num_ranks)


def load_subject(target: Path, data: Path, *, samples: int, overrides: Sequence[str], work: Path) -> Subject:
    """The subject of a run file (YAML), or of a checkpoint with the run it came from.

    Raises:
        ConfigError: `target` is neither, or its run is unknown.
        RecordError: bad data.
    """
    few = _first_records(data, samples, work / "data.jsonl")
    run_file = target if target.is_file() else _run_file_of(target, work / "run.yaml")
    overrides = (*overrides, *_data_override(run_file, overrides, few))
    config = load_run_config(run_file, overrides=list(overrides))
    model = Path(str(config.swift["model"]))
    if not model.is_dir():
        raise ConfigError(f"{run_file}: model {model} is no folder; an audit loads it. Is it a hub id?")
    return Subject(run_file, model, few, tuple(overrides), work)


def _first_records(data: Path, samples: int, output: Path) -> Path:
    """The first records as a file of their own, with absolute image paths."""
    lines = []
    for record in read_jsonl(data, require_images=True)[:samples]:
        line = json.loads(_line_of(data, record))
        line["images"] = [str(path.resolve()) for path in record.image_paths()]
        lines.append(json.dumps(line, ensure_ascii=False))
    if not lines:
        raise ConfigError(f"{data}: holds no record; expected one JSON object per line.")
    output.parent.mkdir(parents=True, exist_ok=True)
    write_text(output, "\n".join(lines) + "\n")
    return output


def _line_of(data: Path, record: Record) -> str:
    with data.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if number == record.line:
                return line
    raise ConfigError(f"{data}: line {record.line} is gone")


def _run_file_of(checkpoint: Path, output: Path) -> Path:
    """The run of a checkpoint as a run file that starts from the checkpoint."""
    places = [checkpoint / RESOLVED_FILE, checkpoint.parent / RESOLVED_FILE]
    resolved = next((place for place in places if place.is_file()), None)
    if resolved is None:
        raise ConfigError(
            f"{checkpoint}: neither a run file nor a checkpoint in its run folder (no {RESOLVED_FILE} beside it); give "
            "the YAML file of the run."
        )
    found = read_json(resolved, error=ConfigError)
    sections = ("custom", "training", "stage2_ab", "rollout_matching")
    flat = flat_of_resolved(found, sections, without=RUN_ONLY) | {"model": str(checkpoint.resolve())}
    write_text(output, yaml.safe_dump(flat, allow_unicode=True, sort_keys=False))
    return output


def _data_override(run_file: Path, overrides: Sequence[str], data: Path) -> list[str]:
    """The data flag of a run file, by the form of it or of what it extends, in place of all data sets it names."""
    alone = ["--set", "custom.fusion=null"]
    if load_run_config(run_file, overrides=list(overrides)).sections.custom.train_jsonl:
        return [*alone, "--set", f"custom.train_jsonl={data}"]
    return [*alone, "--dataset", str(data)]

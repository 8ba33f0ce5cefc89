"""All questions of an audit, in order: short runs first, then everything that can be read off them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from coordexp.audit import answers, backends, token_flow
from coordexp.audit.answers import Answered
from coordexp.audit.equations import check_equations
from coordexp.audit.findings import AuditLine, DifferenceError, ask, skip
from coordexp.audit.run_equations import DumpedStep
from coordexp.audit.subject import ShortRun, Subject
from coordexp.codec.records import order_objects
from coordexp.config import load_run_config
from coordexp.data.source import source_of
from coordexp.errors import ConfigError, CoordExpError
from coordexp.models.coord_offset import OFFSET_FILE, attach_coord_offset, coord_offset_of
from coordexp.models.merge_offset import is_adapter, merge_offset, with_adapter
from coordexp.packing.layout import pack_samples
from coordexp.packing.position_ids import VisionLayout
from coordexp.targets.builder import TargetBuilder
from coordexp.targets.sample import EncodedSample, Media

MOST_STEPS = 6
PACKED_TOLERANCE = 1e-3
RELOAD_TOLERANCE = 1e-5
NO_ANSWERS = "the checkpoint cannot be asked: see prompts, training = infer"


@dataclass(frozen=True)
class Options:
    """What is asked beside the recipe as it stands.

    ranks: a second short run on so many processes; 1 leaves it out.
    other_packing: a short run with packing switched.
    backends: of `infer`, beside hf: vllm.
    server: `base_url`, `served_model` and `api_key_env` of an OpenAI server that serves the model a recipe starts from.
    """

    ranks: int = 1
    other_packing: bool = True
    backends: tuple[str, ...] = ()
    server: Mapping[str, str] = field(default_factory=dict)
    max_new_tokens: int = 64


class Audit:
    """Runs what the questions need, once each."""

    def __init__(self, subject: Subject, options: Options) -> None:
        self.subject, self.options = subject, options
        config = load_run_config(subject.run_file, overrides=list(subject.overrides))
        self.variant = config.variant
        self._has_packing = bool(
            config.sections.training.packing
            if config.variant == "stage1_coord"
            else config.sections.rollout_matching and config.sections.rollout_matching.packing
        )
        batch = int(config.swift["per_device_train_batch_size"] or 1)
        per_step = batch * int(config.swift["gradient_accumulation_steps"] or 1)
        self.steps = max(2, min(MOST_STEPS, math.ceil(len(subject.records) / per_step)))

    @cached_property
    def run(self) -> ShortRun:
        return self.subject.train("run", steps=self.steps)

    @property
    def checkpoint(self) -> Path:
        """What the short run saved last."""
        return self.run.folder / f"checkpoint-{self.steps}"

    @cached_property
    def ranks(self) -> ShortRun:
        """The recipe on several processes."""
        return self.subject.train("ranks", steps=self.steps, num_ranks=self.options.ranks)

    @cached_property
    def merged(self) -> Path:
        """The checkpoint as plain weights: itself, or its adapters merged."""
        if not is_adapter(self.checkpoint) and not (self.checkpoint / OFFSET_FILE).is_file():
            return self.checkpoint
        folder = self.subject.work / "merged"
        merge_offset(self.checkpoint, folder)
        return folder

    @cached_property
    def layout(self) -> VisionLayout:
        from transformers import AutoConfig

        return VisionLayout.from_config(AutoConfig.from_pretrained(self.subject.model))

    @cached_property
    def _opened(self) -> Answered | CoordExpError:
        """`infer` on the checkpoint, or what kept it from answering."""
        try:
            return self._infer("hf", self.checkpoint)
        except CoordExpError as error:
            return error

    @property
    def answered(self) -> Answered:
        if isinstance(self._opened, CoordExpError):
            raise self._opened
        return self._opened

    def _ask_checkpoint(self, area: str, question: str, check: Callable[[], str]) -> AuditLine:
        """A question that needs answers of the checkpoint; where there are none, the line on its prompts says why."""
        if isinstance(self._opened, CoordExpError):
            return skip(area, question, NO_ANSWERS)
        return ask(area, question, check)

    def findings(self) -> list[AuditLine]:
        """One per question."""
        found = self._flow("recipe", self.run)
        if self.options.other_packing:
            found += self._other_packing("padded" if self._has_packing else "packed")
        if self.options.ranks > 1:
            name = f"{self.options.ranks} ranks"
            found += self._flow(name, self.ranks)
        found += self._training_inputs()
        found.append(
            ask(
                "prompts",
                "chat template",
                lambda: answers.check_template(self.subject.model, self.checkpoint),
            )
        )
        found += self._rollouts()
        found += self._answers()
        if "vllm" in self.options.backends:
            found += self._vllm()
        if self.options.server:
            found += self._server(self.options.server)
        found.append(self._ask_checkpoint("packing", "packed = single", self._packed))
        found.append(ask("telemetry", "payload = float64", lambda: self._equations(self.run)))
        if self.options.ranks > 1:
            question = f"payload = float64, {self.options.ranks} ranks"
            found.append(ask("telemetry", question, lambda: self._equations(self.ranks)))
        found.append(self._ask_checkpoint("weights", "checkpoint = plain transformers", self._reloaded))
        return found

    def _answers(self) -> list[AuditLine]:
        return [
            self._ask_checkpoint(
                "answers", "stored = generated", lambda: answers.check_stored(self.answered)
            ),
            self._ask_checkpoint(
                "answers",
                "arg-max of a teacher-forced pass",
                lambda: answers.check_teacher_forced(self.answered),
            ),
        ]

    def _flow(self, name: str, run: ShortRun) -> list[AuditLine]:
        return [
            ask("order", name, lambda: token_flow.check_order(run, self.subject, self.layout)),
            ask("targets", name, lambda: token_flow.check_targets(run, self.subject, self.layout)),
        ]

    def _other_packing(self, name: str) -> list[AuditLine]:
        """The recipe with packing switched, where its settings allow that."""
        is_stage1, value = self.variant == "stage1_coord", str(not self._has_packing).lower()
        extra = ["--set", f"{'training' if is_stage1 else 'rollout_matching'}.packing={value}"]
        extra += ["--lazy_tokenize", "false"] if is_stage1 and not self._has_packing else []
        try:
            run = self.subject.train("other_packing", steps=self.steps, extra=extra)
        except ConfigError as error:
            return [skip("order, targets", name, str(error).splitlines()[-1])]
        return self._flow(name, run)

    def _infer(self, backend: str, model: Path, **settings: Any) -> Answered:
        output = self.subject.work / f"infer_{backend}_{model.name}"
        tokens = self.options.max_new_tokens
        return Answered.by(backend, model, self.subject.data, output, max_new_tokens=tokens, **settings)

    def _training_inputs(self) -> list[AuditLine]:
        return [
            ask("prompts", "training = infer", lambda: self._compared(answers.check_training_prompts)),
            self._ask_checkpoint(
                "pixels", "training = infer", lambda: self._compared(answers.check_training_pixels)
            ),
        ]

    def _compared(self, check: Callable[[ShortRun, Subject, Answered, VisionLayout], str]) -> str:
        return check(self.run, self.subject, self.answered, self.layout)

    def _rollouts(self) -> list[AuditLine]:
        if not any(plan["answers"] for plan in self.run.plans):
            return [skip("rollouts", "prompts and weights", "the recipe's first steps have no rollouts")]
        return [
            self._ask_checkpoint(
                "rollouts",
                "prompts",
                lambda: answers.check_rollout_prompts(self.run, self.subject, self.answered),
            ),
            ask("rollouts", "weights of the step", self._policy),
        ]

    def _policy(self) -> str:
        rollout = self.run.config["rollout_matching"]
        if rollout["decoding"]["temperature"] or rollout["decode_mode"] == "beam":
            raise DifferenceError(
                "rollouts are sampled, so they cannot be repeated; set decoding.temperature: 0"
            )
        asked = {
            "max_new_tokens": rollout["max_new_tokens"],
            "coord": rollout["decoding"]["coord"],
            "prompt": self.run.config["custom"]["prompt"],
        }
        expected = {}
        for plan in self.run.plans:
            step = plan["step"]
            if plan["answers"] and step not in expected:
                expected[step] = self._greedy(self._weights_before(self.run, step), asked)
        return answers.check_policy(self.run, expected, self.subject.tokenizer)

    def _greedy(self, model: Path, asked: Mapping[str, Any]) -> Mapping[str, Sequence[int]]:
        """Greedy answers of a folder's weights to the run's own questions, by sample id."""
        output = self.subject.work / f"replay_{model.name}"
        answered = Answered.by("hf", model, self.subject.data, output, **asked)
        ids = [source_of(record).sample_id for record in self.subject.records]
        requests = answered.job.requests()
        return {
            sample_id: answered.rollouts[request.request_id].response_token_ids
            for sample_id, request in zip(ids, requests, strict=True)
        }

    def _vllm(self) -> list[AuditLine]:
        """Of the checkpoint; where it holds adapters, hf answers with them and vLLM with the merged weights."""
        name = "vllm = hf" if self.merged == self.checkpoint else "vllm, merged = hf"
        if isinstance(self._opened, CoordExpError):
            return [skip("prompts, pixels, answers", name, NO_ANSWERS)]
        try:
            other = self._infer("vllm", self.merged)
        except CoordExpError as error:
            return [AuditLine("answers", name, False, str(error))]
        with closing(other.backend):
            pixels = partial(backends.check_engine_pixels, self.answered, other, "vllm")
            return _compared(name, self.answered, other, "vllm", pixels)

    def _server(self, server: Mapping[str, str]) -> list[AuditLine]:
        """Of the model that the recipe starts from, which is what the server must serve."""
        name = "openai = hf"
        try:
            own = self._infer("hf", self.subject.model)
            other = self._infer("openai", self.subject.model, **server)
        except CoordExpError as error:
            return [AuditLine("answers", name, False, str(error))]
        with closing(own.backend), closing(other.backend):
            pixels = partial(backends.check_sent_pixels, own, "what is sent")
            return _compared(name, own, other, "the server", pixels)

    @torch.no_grad()
    def _packed(self) -> str:
        """Logits of samples that share a sequence against those of each alone, in this process."""
        model, samples = self.answered.model, self._encoded_samples()
        together = pack_samples(samples, self.layout)
        packed = model(**_on(together.model_inputs(), model)).logits[0].float()
        worst = 0.0
        for sample, start in zip(samples, together.starts, strict=True):
            alone = pack_samples([sample], self.layout)
            single = model(**_on(alone.model_inputs(), model)).logits[0].float()
            difference = (packed[start : start + sample.num_tokens] - single).abs().max() / single.abs().max()
            worst = max(worst, float(difference))
            if worst > PACKED_TOLERANCE:
                raise DifferenceError(
                    f"{sample.sample_id}: its logits change by {worst:.2g} (of the largest) when it shares a sequence"
                )
        return f"{len(samples)} samples, largest difference {worst:.1g} of the largest logit"

    def _encoded_samples(self) -> list[EncodedSample]:
        builder = TargetBuilder(self.answered.tokenizer, form=self.run.form)
        samples = []
        for record, question in zip(self.subject.records, self.answered.encoded, strict=True):
            media = None
            if question.get("pixel_values") is not None:
                grids = torch.as_tensor(question["image_grid_thw"]).numpy()
                media = Media(question["pixel_values"], grids)
            objects = order_objects(record.objects, "sorted")
            sample_id = source_of(record).sample_id
            samples.append(
                builder.from_ground_truth(
                    list(question["input_ids"]), objects, sample_id=sample_id, media=media
                )
            )
        return samples[:4]

    def _equations(self, run: ShortRun) -> str:
        """Of the first step of each kind, at the weights it starts from.

        Under LoRA not the very first: no file holds its random start.
        """
        ids_K, seen, found = torch.tensor(self.subject.coord_ids(run.form), dtype=torch.int64), set(), []
        for plan in run.plans:
            step = plan["step"]
            if plan["channel"] in seen or (step == 0 and _is_lora(run)):
                continue
            seen.add(plan["channel"])
            dumped = DumpedStep(
                [one for one in run.plans if one["step"] == step],
                [one for one in run.plans if one["step"] <= step],
                run.payloads[step + 1],
                run.config,
                self.subject.tokenizer.pad_token_id,
            )
            found.append(f"step {step}: {check_equations(dumped, self._model_before(run, step), ids_K)}")
        return "; ".join(found)

    def _model_before(self, run: ShortRun, step: int) -> nn.Module:
        """What optimizer step `step` trains, in float64."""
        folder, settings = self._weights_before(run, step), run.config["custom"]["coord_offset"]
        plain: Any = _plain_model(self.subject.model if is_adapter(folder) else folder)
        model: nn.Module = with_adapter(plain, folder)
        if settings["enabled"] and coord_offset_of(model) is None:
            attach_coord_offset(plain, self.subject.coord_ids(run.form), tie_head=settings["tie_head"])
        return model.double().eval()

    def _weights_before(self, run: ShortRun, step: int) -> Path:
        """The folder of the weights that optimizer step `step` starts from."""
        return self.subject.model if step == 0 else run.folder / f"checkpoint-{step}"

    @torch.no_grad()
    def _reloaded(self) -> str:
        """Logits of the checkpoint as `infer` loads it against plain transformers, merged where it has adapters."""
        folder = self.merged
        inputs = self.answered.inputs(0, self.answered.teachable(self.answered.answer_ids[0]))
        ours = self.answered.model(**inputs, use_cache=False).logits.float()
        plain = _plain_model(folder).to(ours.device).eval()(**inputs, use_cache=False).logits.float()
        difference = float((ours - plain).abs().max() / plain.abs().max())
        if difference > RELOAD_TOLERANCE:
            raise DifferenceError(f"logits of {folder.name} differ by {difference:.2g} of the largest")
        return f"largest difference {difference:.1g} of the largest logit"


def _compared(
    question: str, own: Answered, other: Answered, who: str, pixels: Callable[[], str]
) -> list[AuditLine]:
    """Another backend, called `who`, against hf."""
    return [
        ask("prompts", question, lambda: backends.check_backend_prompts(own, other, who)),
        ask("pixels", question, pixels),
        ask("answers", question, lambda: backends.check_same_answers(own, other, who)),
    ]


def _is_lora(run: ShortRun) -> bool:
    return run.config["swift"].get("tuner_type") not in (None, "full")


def _plain_model(folder: Path) -> nn.Module:
    """As transformers alone loads it, in float32."""
    from transformers import AutoModelForImageTextToText

    model: nn.Module = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    return model


def _on(inputs: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
    device = next(model.parameters()).device
    return {
        key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in inputs.items()
    }

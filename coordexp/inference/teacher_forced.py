"""The distributions of an answer's coordinates, by one forward over what was answered.

For runs of backends that do not show them while generating. The answer is put behind its question as `coordexp infer`
asked it, and the model reads both at once, so each distribution is the one the coordinate was written from, but for
rounding. A pass that was stopped goes on at the last finished batch.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import torch

from coordexp.codec.coord_vocab import CoordVocab
from coordexp.codec.forms.choose import form_of
from coordexp.errors import ConfigError, RecordError
from coordexp.eval.predictions.artifacts import DISTRIBUTIONS, RUN_META, TOKEN_TRACE, read_jsonl_lines
from coordexp.eval.predictions.confidence import TRACE_KEYS
from coordexp.eval.predictions.distributions import (
    ANSWER_CRC,
    COORD_DISTRIBUTIONS,
    answer_crc,
    entry_of,
    lacks_distributions,
)
from coordexp.files import json_line, read_json
from coordexp.inference.fingerprint import file_fingerprint, model_fingerprint
from coordexp.inference.infer import Inference
from coordexp.inference.recorded import question_of
from coordexp.inference.settings import InferSettings
from coordexp.rollout.backends.hf import HfBackend
from coordexp.rollout.decoding.distributions import distribution_of, summarise
from coordexp.rollout.types import BinDistribution, RolloutRequest
from coordexp.swift_bridge.generation_prompts import (
    collate_questions,
    encode_question,
    questions_template,
    with_answers,
    without_training_hooks,
)


def needs_distributions(run: Path) -> bool:
    """Whether neither the trace of an inference run nor a file beside it holds the distributions."""
    traces = read_jsonl_lines(run / TOKEN_TRACE, TRACE_KEYS)
    return not (run / DISTRIBUTIONS).is_file() and any(map(lacks_distributions, traces))


def record_distributions(
    run: Path,
    *,
    model: Path | None = None,
    data: Path | None = None,
    batch_size: int = 8,
    torch_dtype: str = "float32",
    on_images: Callable[[int, int], object] | None = None,
) -> None:
    """Write `coord_distributions.jsonl` into the folder of an inference run.

    model, data: where they stand now; None takes what `infer_run.json` says.  on_images: called with (images just
    done, images in all).

    Raises:
        ConfigError: model or data are not those of the run.
        RecordError: the trace is not of these answers, or holds tokens that the tokenizer does not know.
    """
    job = _job_of(run, model, data, batch_size, torch_dtype)
    traces = read_jsonl_lines(run / TOKEN_TRACE, TRACE_KEYS)
    if len(traces) != len(job.records):
        raise RecordError(
            f"{run}: {len(traces)} traced answers, but {len(job.records)} records of {job.data}."
        )
    partial = run / f"{DISTRIBUTIONS}.partial"
    backend, tokenizer = job.load_backend()
    with closing(backend), partial.open("ab") as stream:
        assert isinstance(backend, HfBackend)
        reader = _AnswerReader(backend, tokenizer)
        done = _whole_batches(partial, batch_size)
        if on_images is not None:
            on_images(done, len(traces))
        requests = job.requests()
        for start in range(done, len(traces), batch_size):
            batch = slice(start, start + batch_size)
            rows = reader.rows(requests[batch], traces[batch])
            stream.write(b"".join(map(json_line, rows)))
            stream.flush()
            os.fsync(stream.fileno())
            if on_images is not None:
                on_images(len(rows), len(traces))
    partial.replace(run / DISTRIBUTIONS)


def _job_of(run: Path, model: Path | None, data: Path | None, batch_size: int, torch_dtype: str) -> Inference:
    """The run's own questions to the run's own model."""
    meta = read_json(run / RUN_META)
    form = meta.get("answer_form", "coordjson")
    if not form_of(form).has_coord_tokens:
        raise ConfigError(
            f"{run}: its answers ({form}) write coordinates as numbers, which have no distribution over bins, so that "
            "there is no expected IoU; use --method logprob."
        )
    model, data = model or Path(meta["model"]), data or Path(meta["data"])
    for path, flag in ((model, "--model"), (data, "--data")):
        if not path.exists():
            raise ConfigError(
                f"{path}, which {run / RUN_META} names, does not exist; say where it is with {flag}."
            )
    settings = InferSettings(
        batch_size=batch_size,
        torch_dtype=torch_dtype,
        bad_images="skip",  # what could not be asked about has no answer
        **question_of(meta),
    )
    for name, found in (("model", model_fingerprint(model)), ("data", file_fingerprint(data))):
        if found != meta[f"{name}_hash"]:
            raise ConfigError(
                f"{model if name == 'model' else data} is not the {name} that {run} was made with (its fingerprint is "
                f"{found}, that of the run {meta[f'{name}_hash']}); give --{name}."
            )
    return Inference.prepare(model, data, run, settings)


class _AnswerReader:
    """Forwards over questions with their answers."""

    def __init__(self, backend: HfBackend, tokenizer: Any) -> None:
        self._backend = backend
        self._tokenizer = tokenizer
        self._vocab = CoordVocab.from_tokenizer(tokenizer)
        self._questions = questions_template(backend.template, backend.model)
        self._coord_ids_K = torch.tensor(self._vocab.ids, device=backend.model.device)
        backend.model.eval()

    @torch.inference_mode()
    def rows(
        self, requests: Sequence[RolloutRequest], traces: Sequence[dict[str, Any]]
    ) -> list[dict[str, Any]]:
        """Lines of the file for one batch."""
        answers = [self._ids_of(trace) for trace in traces]
        positions = [
            [p for p, token in enumerate(ids) if self._vocab.bin_of(token) is not None] for ids in answers
        ]
        union = sorted({p for found in positions for p in found})
        place = {p: index for index, p in enumerate(union)}
        asked = [row for row, found in enumerate(positions) if found]
        logits_BUV = self._logits([(requests[row], answers[row]) for row in asked], union) if asked else None
        rows = []
        for row, (trace, found) in enumerate(zip(traces, positions, strict=True)):
            read: list[BinDistribution] = []
            if logits_BUV is not None and found:
                kept_NV = logits_BUV[asked.index(row), [place[p] for p in found]]
                read = [distribution_of(one) for one in summarise(kept_NV, self._coord_ids_K).tolist()]
            rows.append(
                {
                    "image_id": trace["image_id"],
                    ANSWER_CRC: answer_crc(trace),
                    COORD_DISTRIBUTIONS: entry_of(found, read),
                }
            )
        return rows

    def _logits(
        self, answered: Sequence[tuple[RolloutRequest, Sequence[int]]], positions: Sequence[int]
    ) -> torch.Tensor:
        """From which the tokens at these positions of the answers were written.  [B, positions, V]"""
        template, model = self._backend.template, self._backend.model
        encoded = [encode_question(self._questions, one.messages, one.images) for one, _ in answered]
        batch = collate_questions(self._questions, encoded, model.device)
        prompt_length = batch["input_ids"].shape[1]
        rows = torch.tensor([prompt_length + p - 1 for p in positions], device=model.device)
        batch = with_answers(batch, [answer for _, answer in answered], self._tokenizer.pad_token_id)
        with without_training_hooks(template):
            logits: torch.Tensor = model(**batch, logits_to_keep=rows, use_cache=False).logits
        return logits

    def _ids_of(self, trace: dict[str, Any]) -> list[int]:
        tokens = trace["generated_token_text"]
        ids: list[int] = self._tokenizer.convert_tokens_to_ids(tokens)
        back = self._tokenizer.convert_ids_to_tokens(ids)
        unknown = [token for token, found in zip(tokens, back, strict=True) if token != found]
        if unknown:
            raise RecordError(
                f"image {trace['image_id']}: the tokenizer does not know {unknown[0]!r}, which the trace holds; is "
                "this the model that answered?"
            )
        return ids


def _whole_batches(partial: Path, batch_size: int) -> int:
    """Images whose lines a stopped pass left, in whole batches; what stands behind them is cut off."""
    with partial.open("rb") as stream:
        lines = [line for line in stream if line.endswith(b"\n")]
    done = len(lines) - len(lines) % batch_size
    os.truncate(partial, sum(map(len, lines[:done])))
    return done

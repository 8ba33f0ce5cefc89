"""Settings that a backend cannot honour are refused at start-up, with what to use instead."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from coordexp.config.rollout import RolloutMatching
from coordexp.errors import ConfigError
from coordexp.rollout.build import build_policy_backend, check_settings
from coordexp.rollout.hf import HfPolicyBackend

HF: dict[str, Any] = {"backend": "hf"}
VLLM: dict[str, Any] = {"backend": "vllm"}
BEAM: dict[str, Any] = {**HF, "decode_mode": "beam"}


def check(values: dict[str, Any], **place: Any) -> None:
    defaults = {"device_type": "cpu", "world_size": 1, "num_kv_heads": 8, "deepspeed": False}
    check_settings(RolloutMatching(**values), **{**defaults, **place})


@pytest.mark.parametrize(
    ("values", "place", "says"),
    [
        (BEAM, {}, r"num_beams: 1 with decode_mode: beam; give 2 or more"),
        ({**BEAM, "num_beams": 3, "repeat_terminate": {"enabled": True}}, {}, r"use decode_mode: greedy"),
        ({**HF, "offload": {"enabled": True}}, {}, r"offload\.enabled: true moves nothing"),
        (
            {**HF, "offload": {"enabled": True, "offload_model": True}},
            {"device_type": "cuda"},
            r"offload_model: backend hf",
        ),
        ({**HF, "offload": {"enabled": True, "offload_optimizer": True}}, {}, r"on the CPU already"),
        (
            {**VLLM, "offload": {"enabled": True, "offload_model": True}},
            {"device_type": "cuda", "deepspeed": True},
            r"zero_optimization\.offload",
        ),
        (
            {**VLLM, "offload": {"enabled": True, "offload_model": True}, "vllm": {"sleep_level": 2}},
            {"device_type": "cuda"},
            r"use sleep_level 1",
        ),
        (
            {**VLLM, "vllm": {"mode": "server", "server": {"servers": [{"base_url": "http://127.0.0.1:8000"}]}}},
            {},
            r"vllm\.mode: server is a valid value.*use mode: colocate",
        ),
        (
            {**VLLM, "vllm": {"sync": {"mode": "adapter", "fallback_to_full": False}}},
            {},
            r"sync\.mode: adapter.*use mode: full",
        ),
        (
            {**VLLM, "max_new_tokens": 512, "vllm": {"max_model_len": 512}},
            {},
            r"vllm\.max_model_len: 512 leaves no room",
        ),
        ({**VLLM, "decoding": {"temperature": 2.5}}, {}, r"decoding\.temperature: 2\.5.*use backend: hf"),
        ({**VLLM, "vllm": {"sleep_level": 1}}, {}, r"vllm\.sleep_level: 1 needs a CUDA device; use 0"),
        ({**VLLM, "vllm": {"tensor_parallel_size": 2}}, {}, r"tensor_parallel_size: 2 needs CUDA"),
        (
            {**VLLM, "vllm": {"tensor_parallel_size": 2}},
            {"device_type": "cuda", "world_size": 3},
            r"does not divide the 3 training processes",
        ),
        (
            {**VLLM, "vllm": {"tensor_parallel_size": 4}},
            {"device_type": "cuda", "world_size": 4, "num_kv_heads": 2},
            r"does not divide the model's 2 key-value heads",
        ),
    ],
)  # fmt: skip
def test_refused(values: dict[str, Any], place: dict[str, Any], says: str):
    pytest.importorskip("vllm") if values["backend"] == "vllm" else None
    with pytest.raises(ConfigError, match=r"rollout_matching\..*" + says):
        check(values, **place)


@pytest.mark.parametrize(
    ("values", "place"),
    [
        (HF, {}),
        ({**BEAM, "num_beams": 4}, {}),
        ({**HF, "decoding": {"temperature": 3.0}}, {}),
        ({**HF, "offload": {"enabled": True, "offload_optimizer": True}}, {"device_type": "cuda"}),
        (
            {**VLLM, "vllm": {"sleep_level": 1, "tensor_parallel_size": 2}},
            {"device_type": "cuda", "world_size": 4},
        ),
    ],
)
def test_accepted(values: dict[str, Any], place: dict[str, Any]):
    pytest.importorskip("vllm") if values["backend"] == "vllm" else None
    check(values, **place)


def test_a_knob_without_effect_is_said(caplog):
    with caplog.at_level(logging.WARNING):
        check({**HF, "decoding": {"temperature": 0.0, "top_p": 0.9}})
    assert "top_p 0.9" in caplog.text


def test_the_hf_backend_is_built_around_a_wrapped_model(policy):
    import torch

    settings = RolloutMatching(backend="hf")
    backend = build_policy_backend(
        settings,
        model=torch.nn.DataParallel(policy.model),
        template=policy.template,
        model_dir=str(policy.model_dir),
    )
    assert isinstance(backend, HfPolicyBackend)
    assert (backend.name, backend.policy_version) == ("hf", 0)
    backend.push_policy(4)
    assert backend.policy_version == 4

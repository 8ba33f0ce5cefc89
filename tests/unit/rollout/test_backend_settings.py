"""Settings that a backend cannot honour are refused at start-up, with what to use instead."""

from __future__ import annotations

import logging
from typing import Any

import pytest
from support.processes import free_port

from coordexp.config.schema.rollout import RolloutMatching
from coordexp.config.schema.rollout_eval import EvalRollouts
from coordexp.errors import ConfigError, RolloutError
from coordexp.rollout.backends.hf import HfBackend
from coordexp.rollout.backends.vllm_client import VllmClientBackend
from coordexp.rollout.session.build import build_policy_backend, check_settings

HF: dict[str, Any] = {"backend": "hf"}
VLLM: dict[str, Any] = {"backend": "vllm"}
ADDRESS = {"base_url": "http://127.0.0.1:8000"}
SERVER: dict[str, Any] = {"mode": "server", "server": {"servers": [ADDRESS]}}
SECTIONS = [RolloutMatching, EvalRollouts]
"""Of stage 2 and of stage 1; errors name the one that the run file has."""
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
        ({**VLLM, "vllm": {**SERVER, "sleep_level": 1}}, {}, r"vllm\.sleep_level: 1: a server's engine never sleeps"),
        (
            {**VLLM, "vllm": {**SERVER, "tensor_parallel_size": 2}},
            {"device_type": "cuda", "world_size": 2},
            r"tensor_parallel_size: 2: a server has one device; use 1, and more servers",
        ),
        (
            {**VLLM, "vllm": {"mode": "server", "server": {"servers": [ADDRESS, ADDRESS]}}},
            {},
            r"server\.servers: http://127\.0\.0\.1:8000 is there twice",
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
        ({**VLLM, "vllm": SERVER}, {"world_size": 3}),
        (
            {**VLLM, "vllm": SERVER, "offload": {"enabled": True, "offload_optimizer": True}},
            {"device_type": "cuda"},
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


def test_engine_settings_that_belong_to_the_server_are_said(caplog):
    pytest.importorskip("vllm")
    with caplog.at_level(logging.WARNING):
        check({**VLLM, "vllm": {**SERVER, "enforce_eager": True, "max_num_seqs": 8}})
    assert "enforce_eager, max_num_seqs have no effect with mode: server" in caplog.text
    caplog.clear()
    check({**VLLM, "vllm": SERVER})
    assert not caplog.records


@pytest.mark.parametrize(
    ("servers", "says"),
    [
        (
            {"servers": [{"base_url": "127.0.0.1:8000"}]},
            r"'127\.0\.0\.1:8000' is no address; write it as http",
        ),
        (
            {"servers": [ADDRESS], "api_key_env": "COORDEXP_NO_SUCH_KEY"},
            r"variable COORDEXP_NO_SUCH_KEY is not set",
        ),
    ],
)
@pytest.mark.parametrize("section", SECTIONS)
def test_a_server_that_cannot_be_asked_is_refused(
    policy, section: type[RolloutMatching], servers: dict[str, Any], says: str
):
    import torch

    settings = section(backend="vllm", vllm={"mode": "server", "server": servers})
    with pytest.raises(ConfigError, match=rf"{section.where}\.vllm\.server\..*{says}"):
        VllmClientBackend(settings, policy.model, policy.template, dtype=torch.float32)


@pytest.mark.parametrize("section", SECTIONS)
def test_a_server_that_is_not_there_is_named(policy, section: type[RolloutMatching]):
    import torch

    address = f"http://127.0.0.1:{free_port()}"
    servers = {"servers": [{"base_url": address}], "timeout_s": 0.6}
    settings = section(backend="vllm", vllm={"mode": "server", "server": servers})
    key = rf"{section.where}\.vllm\.server\.timeout_s"
    with pytest.raises(
        RolloutError, match=rf"{address} did not answer within 0\.6 s \({key}.*rollout-server"
    ):
        VllmClientBackend(settings, policy.model, policy.template, dtype=torch.float32)


def test_the_hf_backend_is_built_around_a_wrapped_model(policy):
    import torch

    settings = RolloutMatching(backend="hf")
    backend = build_policy_backend(
        settings,
        model=torch.nn.DataParallel(policy.model),
        template=policy.template,
        model_dir=str(policy.model_dir),
    )
    assert isinstance(backend, HfBackend)
    assert (backend.name, backend.policy_version) == ("hf", 0)
    backend.push_policy(4)
    assert backend.policy_version == 4

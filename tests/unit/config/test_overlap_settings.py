"""`rollout_matching.overlap` needs an engine that is not on the training device."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from coordexp.config.schema.rollout import RolloutMatching

SERVER = {"mode": "server", "server": {"servers": [{"base_url": "http://127.0.0.1:8000"}]}}


@pytest.mark.parametrize(
    "engine",
    [{"backend": "hf"}, {"backend": "vllm"}, {"backend": "hf", "vllm": SERVER}],
    ids=["hf", "colocate", "hf+server"],
)
def test_an_engine_on_the_training_device_is_refused(engine):
    with pytest.raises(
        ValidationError, match=r"cannot do both at once; use backend: vllm with vllm.mode: server"
    ):
        RolloutMatching.model_validate({**engine, "overlap": {"enabled": True}})
    RolloutMatching.model_validate({**engine, "overlap": {"enabled": False}})


def test_training_state_cannot_be_away_while_it_trains():
    settings = {"backend": "vllm", "vllm": SERVER, "overlap": {"enabled": True}, "offload": {"enabled": True}}
    with pytest.raises(
        ValidationError, match=r"offload.enabled moves model or optimizer away .*; set one of them"
    ):
        RolloutMatching.model_validate(settings)


def test_a_server_may_answer_while_the_model_trains():
    settings = RolloutMatching.model_validate(
        {"backend": "vllm", "vllm": SERVER, "overlap": {"enabled": True}}
    )
    assert (settings.overlap.queue_size, settings.decode_batch_size) == (2, 4)

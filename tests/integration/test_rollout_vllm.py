"""vLLM (CPU build) in the training process against transformers: same weights, same answers, loud failures."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.pictures import PICTURES
from support.processes import ROOT
from support.vllm import require_vllm

pytestmark = [pytest.mark.slow, pytest.mark.vllm]
NUM_SCENES = 32


@pytest.fixture(scope="module")
def facts(nano_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    require_vllm()
    from coordexp.data.shapes import PRESETS, generate_shapes

    root = tmp_path_factory.mktemp("rollout_vllm")
    generate_shapes(root / "scenes", PRESETS["pixels"], num_train=0, num_val=NUM_SCENES, seed=3)
    program = Path(__file__).parent / "rollout_vllm_program.py"
    env = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}",
    }
    done = subprocess.run(
        [sys.executable, str(program), str(nano_model), str(root / "scenes" / "val.jsonl"), str(root / "facts.json")],
        capture_output=True, text=True, env=env, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    found: dict[str, Any] = json.loads((root / "facts.json").read_text())
    return found


@pytest.mark.parametrize(
    ("moment", "version"),
    [
        ("before", 1),
        ("rules", 1),
        ("median", 1),
        ("expectation", 1),
        ("guided", 1),
        ("guided median", 1),
        ("after", 2),
        ("lora", 5),
    ],
)
def test_greedy_answers_prompts_and_log_probabilities_agree(facts, moment: str, version: int):
    """Before training, with repeat-aware termination, with coordinates read from their distribution, guided, after 5
    optimizer steps, and with LoRA layers merged."""
    found = facts[moment]
    assert found["equal_answers"] == found["equal_prompts"] == found["equal_endings"] == NUM_SCENES
    assert found["logprob_gap"] < 2e-5
    assert found["versions"] == [version]
    assert found["distinct_answers"] > NUM_SCENES // 4  # agreement on one constant answer would say little


def test_reading_coordinates_from_their_distribution_changes_answers(facts):
    assert min(facts["median"]["changed_answers"], facts["expectation"]["changed_answers"]) > NUM_SCENES // 2


def test_guided_answers_are_whole(facts):
    assert facts["guided"]["whole"] == facts["guided median"]["whole"] == NUM_SCENES
    assert facts["guided"]["whole_sampled"] == NUM_SCENES
    assert facts["guided median"]["terminated"] > 0


def test_engine_args_reach_the_engine(facts):
    """One that is ours to set by nobody else, and one over what ms-swift would set."""
    assert facts["engine"] == {"max_num_batched_tokens": 640, "mm_processor_cache_gb": 0.25}


def test_pictures_of_every_kind_are_seen_alike(facts):
    """Turned and mirrored by EXIF, transparent, of 16 bits."""
    found = facts["pictures"]
    assert found["equal_answers"] == found["equal_prompts"] == len(PICTURES)
    assert found["logprob_gap"] < 2e-5
    assert found["distinct_answers"] > len(PICTURES) // 2


def test_the_engine_runs_no_code_that_comes_with_the_model(facts):
    assert facts["trust_remote_code"] is False


def test_training_changed_what_is_answered(facts):
    assert facts["changed_answers"] == NUM_SCENES


def test_repetition_is_ended_in_some_answers_and_not_in_all(facts):
    assert 0 < facts["rules"]["terminated"] < NUM_SCENES
    assert facts["before"]["terminated"] == 0


def test_nothing_of_training_is_disturbed(facts):
    assert facts["random_state_kept_at_start"]
    assert facts["random_state_kept"]
    assert facts["training"]


def test_a_seed_makes_the_answer_whatever_the_order(facts):
    assert facts["sampling"] == {"same_seed_same_answer": 8, "other_seed_same_answer": 0}


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("no push", r"request val:0 before any policy was pushed; call push_policy"),
        (
            "withheld",
            r"request val:0 to request val:1.*policy version 1, but the trained weights have changed",
        ),
        (
            "lost push",
            r"push of policy version 3 \(checksum [0-9a-f]{12}\) 4 tensors differ.*qkv_proj\.weight",
        ),
        ("after lost push", r"answered by policy version 2, but version 3 was announced last"),
        ("push without head", r"policy version 4 .*1 tensors differ.*lm_head\.weight.*tied embeddings"),
        ("dies", r"failed at 2 requests \(request val:0 to request val:1\): RuntimeError: CUDA error"),
        (
            "answers another prompt",
            r"the prompt of request val:0 has \d+ tokens in the engine, the template encodes",
        ),
        ("loses requests", r"idle but never answered 2 requests \(request val:0 to request val:1\)"),
        (
            "timeout",
            r"request val:0 to request val:1\) took longer than 1e-09 s \(rollout_matching\.generate_timeout_s",
        ),
        ("closed", r"request val:0 came after the backend was closed"),
        ("two images", r"request val:0 has 2 images, the engine takes 1; use backend hf\."),
    ],
)
def test_a_failing_engine_or_push_stops_with_what_to_check(facts, fault: str, says: str):
    assert facts[fault].startswith("vllm backend: ")
    assert re.search(says, facts[fault]), facts[fault]


def test_the_engine_answers_again_after_a_failed_call(facts):
    assert facts["recovers"] == 2


def test_the_preflight_asks_for_a_few_tokens(facts):
    assert facts["preflight_tokens"] == 4

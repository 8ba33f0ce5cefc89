"""vLLM in the training process: known answers after every push and every wake, asleep at levels 0, 1 and 2; two GPUs.

What is known: a model whose weights write one token for ever, and that the first weights answer again as at first.
Engines start in processes of their own, 25 s each on a GPU.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.gpu import Say, needs
from support.gpu_runs import run_program

pytestmark = [pytest.mark.gpu, pytest.mark.slow, pytest.mark.vllm]

PROGRAM = Path(__file__).parent / "vllm_program.py"
KNOWN = {2: 70, 3: 300}
"""Version -> the one token it writes: `TOKENS` of the program."""


def facts_of(
    model: Path, scenes: Path, device: torch.device, folder: Path, *, level: int = 0, parallel: int = 1
) -> list[dict[str, Any]]:
    """What the program wrote on each rank."""
    arguments = (model, scenes / "val.jsonl", device.type, level, parallel, folder / "facts")
    run_program(PROGRAM, device, *arguments, processes=parallel)
    return [json.loads((folder / f"facts.{rank}").read_text()) for rank in range(parallel)]


def known_answers(facts: dict[str, Any]) -> int:
    """How many answers were as known: of constant weights, and of the first ones after a sleep and at the end."""
    rounds, version, known = facts["rounds"], None, 0
    for each in rounds:
        version = each["pushed"] or version
        for index, answer in enumerate(each["answers"]):
            if version in KNOWN:
                assert answer == [KNOWN[version]] * len(answer)
                assert len(answer) > 1
            else:
                assert answer == rounds[0]["answers"][index]
            known += 1
    return known


@pytest.fixture(scope="module")
def awake(
    device: torch.device, nano_model: Path, scenes: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """An engine that never sleeps."""
    needs("ms-swift", "vLLM")
    return facts_of(nano_model, scenes, device, tmp_path_factory.mktemp("awake"))[0]


def test_an_engine_that_stays_awake_gives_the_known_answers(awake: dict[str, Any], say: Say):
    first = awake["rounds"][0]["answers"]
    known = known_answers(awake)
    different = len(set(map(tuple, first)))
    say(f"sleep_level 0: {known} answers of {len(awake['rounds'])} rounds as known, {different} different")
    assert known == 7 * len(first)
    assert different > 1


@pytest.mark.parametrize("level", [1, 2])
def test_an_engine_that_sleeps_gives_them_after_every_wake(
    level: int,
    cuda: torch.device,
    awake: dict[str, Any],
    nano_model: Path,
    scenes: Path,
    tmp_path: Path,
    say: Say,
):
    [facts] = facts_of(nano_model, scenes, cuda, tmp_path, level=level)
    known, asleep = known_answers(facts), max(facts["asleep"])
    say(
        f"sleep_level {level}: {known} answers as known and as those of level 0; device memory {asleep / 2**20:.0f} "
        f"MiB asleep, {facts['awake'] / 2**20:.0f} MiB awake"
    )
    assert facts["rounds"] == awake["rounds"]
    assert facts["awake"] - asleep > 2**30


def test_an_engine_on_two_devices_gives_them_to_both_ranks(
    cuda: torch.device, two_gpus: None, wide_model: Path, scenes: Path, tmp_path: Path, say: Say
):
    needs("ms-swift", "vLLM")
    ranks = facts_of(wide_model, scenes, cuda, tmp_path, parallel=2)
    known = [known_answers(facts) for facts in ranks]
    different = ranks[0]["rounds"][0]["answers"] != ranks[1]["rounds"][0]["answers"]
    say(f"tensor_parallel_size 2: {known} answers as known on the ranks, which have questions of their own")
    assert different


@pytest.fixture(scope="module")
def wide_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two key-value heads, so that two devices can share them."""
    from dataclasses import replace

    from coordexp.models.tiny import PRESETS, build_tiny_model

    path = tmp_path_factory.mktemp("wide") / "model"
    build_tiny_model(path, preset="nano", size=replace(PRESETS["nano"], text_kv_heads=2))
    return path

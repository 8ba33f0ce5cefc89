"""A real `vllm serve` behind `--backend openai`: the prompt that its model sees is that of the checkpoint."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import pytest
from support.audit import run_file
from support.processes import ROOT, free_port, run_coordexp, swift_environment
from support.vllm import require_vllm

from coordexp.config import Prompt
from coordexp.config.prompt import write_prompt

pytestmark = [pytest.mark.slow, pytest.mark.vllm]
START_S = 240.0
PROMPT = Prompt(user="Find all.", system="You detect.", media_order="text_first")


class Served(NamedTuple):
    url: str
    model: Path


@pytest.fixture(scope="module")
def served(nano_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A server of a checkpoint, and the same checkpoint with the record of how it was trained."""
    require_vllm()
    folder = tmp_path_factory.mktemp("openai")
    model = folder / "model"
    model.mkdir()
    for file in nano_model.iterdir():
        (model / file.name).symlink_to(file)
    write_prompt(model, PROMPT)
    url, log = f"http://127.0.0.1:{free_port()}", folder / "log.txt"
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(nano_model), "--served-model-name",
        "nano", "--host", "127.0.0.1", "--port", url.rpartition(":")[2], "--dtype", "float32", "--max-model-len", "512",
        "--max-num-seqs", "4", "--enforce-eager",
    ]  # fmt: skip
    environment = swift_environment(VLLM_CPU_KVCACHE_SPACE="1", VLLM_CPU_OMP_THREADS_BIND="nobind")
    with log.open("w") as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            env=environment,
            start_new_session=True,
        )
    try:
        wait_until_healthy(url, process, log)
        yield Served(url, model)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def wait_until_healthy(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + START_S
    while time.monotonic() < end:
        assert process.poll() is None, log.read_text()[-4000:]
        try:
            urllib.request.urlopen(f"{url}/health", timeout=2)
            return
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    raise AssertionError(f"no answer in {START_S} s\n{log.read_text()[-4000:]}")


def infer(served: Served, scenes: Path, output: Path, *flags: object) -> subprocess.CompletedProcess[str]:
    return run_coordexp(
        "infer", "--model", served.model, "--data", scenes / "val.jsonl", "--output", output, "--max-new-tokens", 16,
        *flags,
    )  # fmt: skip


def test_it_answers_to_the_prompt_of_the_checkpoint_as_transformers_does(
    served: Served, scenes: Path, tmp_path: Path
) -> None:
    to_server = ("--backend", "openai", "--base-url", f"{served.url}/v1", "--served-model", "nano")
    for name, flags in (("hf", ()), ("openai", to_server)):
        done = infer(served, scenes, tmp_path / name, *flags)
        assert done.returncode == 0, done.stderr[-3000:]
        assert "does not say which tokens" not in done.stderr
    by_hf, by_server = (
        [json.loads(line) for line in (tmp_path / name / "pred_token_trace.jsonl").read_text().splitlines()]
        for name in ("hf", "openai")
    )
    for ours, theirs in zip(by_hf, by_server, strict=True):
        for key in ("generated_token_text", "num_prompt_tokens"):
            assert ours[key] == theirs[key]
        assert theirs["token_logprobs"] == pytest.approx(ours["token_logprobs"], abs=1e-3)


def test_the_audit_asks_the_server_too(
    served: Served, nano_model: Path, scenes: Path, tmp_path: Path
) -> None:
    """Prompt ids, the pictures as they are sent, and greedy answers; a server of another model is noticed by these."""
    from coordexp.models.tiny import build_tiny_model

    build_tiny_model(tmp_path / "other", preset="nano", seed=1)
    found = {}
    for name, model in (("same", nano_model), ("other", tmp_path / "other")):
        (tmp_path / name).mkdir(exist_ok=True)
        output = tmp_path / name / "findings.json"
        done = run_coordexp(
            "audit", run_file(tmp_path / name, model), scenes / "train.jsonl", "--samples", 4, "--recipe-only",
            "--max-new-tokens", 16, "--base-url", f"{served.url}/v1", "--served-model", "nano", "--output", output,
        )  # fmt: skip
        assert done.returncode == (0 if name == "same" else 1), done.stdout[-3000:] + done.stderr[-3000:]
        lines = json.loads(output.read_text())["findings"]
        found[name] = {one["area"]: one for one in lines if one["question"] == "openai = hf"}
    assert {area: one["passed"] for area, one in found["same"].items()} == dict.fromkeys(
        ("prompts", "pixels", "answers"), True
    )
    assert found["same"]["prompts"]["detail"] == "4 prompts, by the ids that the backend returns"
    assert {area for area, one in found["other"].items() if one["passed"] is False} == {"answers"}

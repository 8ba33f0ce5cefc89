"""A real `vllm serve` of an exported folder behind `--backend openai`: it is asked as the checkpoint was trained, here
through the baked vectors of its prompt, and answers as CoordExp and plain transformers do.
"""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from PIL import Image
from support.audit import run_file
from support.processes import run_coordexp
from support.rollout_server import is_healthy, openai_server
from support.vllm import require_vllm

import coordexp
from coordexp.cli.main import main
from coordexp.codec.coord_vocab import CoordVocab
from coordexp.codec.pieces import token_names
from coordexp.config import Prompt
from coordexp.config.prompt import PROMPT_FILE, write_prompt

pytestmark = [pytest.mark.slow, pytest.mark.vllm]
START_S = 240.0
NUM_TOKENS = 32
PROMPT = Prompt(user="Find {classes}.", system="You detect.", media_order="text_first")


NUM_IMAGES = 16


class Served(NamedTuple):
    """model: the exported folder that is served.  bare: the same without the record of its prompt."""

    url: str
    model: Path
    bare: Path


def adapted_checkpoint(base: Path, folder: Path) -> None:
    """LoRA on both towers and offsets of the coordinate tokens, all far from zero, as a run leaves them.

    With a latent prefix of that model.
    """
    from support.latents import latent_checkpoint
    from support.stage1_head import load, with_lora
    from transformers import AutoTokenizer

    from coordexp.models.coord_offset import attach_coord_offset, save_coord_offset
    from coordexp.models.model_files import PREFIX_FILES

    base = latent_checkpoint(base, folder.with_name("base"), str(PROMPT.user), 4)
    model = load(base)
    ids = CoordVocab.from_tokenizer(AutoTokenizer.from_pretrained(base)).ids
    offset = attach_coord_offset(model, ids, tie_head=True)
    offset.embedding.coord_offset_KH.data.normal_(std=0.3, generator=torch.Generator().manual_seed(1))
    model = with_lora(model, target_modules=r".*\.(q_proj|o_proj|gate_proj|qkv|proj|linear_fc1|linear_fc2)$")
    model.peft_config["default"].base_model_name_or_path = str(base)
    model.save_pretrained(folder)
    save_coord_offset(model, folder)
    write_prompt(folder, PROMPT)
    for name in PREFIX_FILES:
        (base / name).rename(folder / name)


@pytest.fixture(scope="module")
def exported(nano_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export")
    checkpoint, baked = str(folder / "checkpoint-3"), str(folder / "baked")
    adapted_checkpoint(nano_model, folder / "checkpoint-3")
    asked = ["--classes", "red box", "blue circle"]
    assert main(["model", "export-prefix", checkpoint, *asked, "--out", baked, "--bake"]) == 0
    assert main(["model", "export", baked, "--out", str(folder / "model")]) == 0
    return folder / "model"


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from coordexp.data.shapes import PRESETS, generate_shapes

    path = tmp_path_factory.mktemp("pictures") / "scenes"
    generate_shapes(path, PRESETS["demo"], num_train=1, num_val=NUM_IMAGES, seed=5)
    return path


@pytest.fixture(scope="module")
def served(exported: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    require_vllm()
    folder = tmp_path_factory.mktemp("openai")
    bare = folder / "bare"
    bare.mkdir()
    for file in exported.iterdir():
        if file.name != PROMPT_FILE:
            (bare / file.name).symlink_to(file)
    log = folder / "log.txt"
    with openai_server(exported, log, "--max-num-seqs", 4) as url:
        wait_until_healthy(url, log)
        yield Served(url, exported, bare)


def wait_until_healthy(url: str, log: Path) -> None:
    end = time.monotonic() + START_S
    while time.monotonic() < end:
        if is_healthy(url):
            return
        time.sleep(0.5)
    raise AssertionError(f"no answer in {START_S} s\n{log.read_text()[-4000:]}")


def infer(served: Served, pictures: Path, output: Path, *flags: object) -> subprocess.CompletedProcess[str]:
    return run_coordexp(
        "infer", "--model", served.model, "--data", pictures / "val.jsonl", "--output", output,
        "--max-new-tokens", NUM_TOKENS, "--coord", "argmax", *flags,
    )  # fmt: skip


def answers_by_the_card(model: Path, pictures: Path) -> list[list[str]]:
    """What plain transformers answers, asked by the very code of the model card."""
    card = (model / "README.md").read_text()
    code = card.split("```python\n")[1].split("```")[0].replace('folder = "."', f"folder = {str(model)!r}")
    names: dict[str, Any] = {}
    exec(code.partition("\nimage = Image.open")[0], names)
    records = [json.loads(line) for line in (pictures / "val.jsonl").read_text().splitlines()]
    opened = [Image.open(pictures / record["images"][0]).convert("RGB") for record in records]
    assert {parameter.dtype for parameter in names["model"].parameters()} == {torch.float32}
    return [token_names(names["processor"].tokenizer, names["answer"](image, NUM_TOKENS)) for image in opened]


def test_an_exported_folder_answers_token_for_token_alike_in_three_loaders(
    served: Served, pictures: Path, tmp_path: Path
) -> None:
    """CoordExp, vLLM's server and plain transformers, on 16 images; `coordexp.Detector` too."""
    to_server = ("--backend", "openai", "--base-url", f"{served.url}/v1", "--served-model", "model")
    for name, flags in (("hf", ()), ("openai", to_server)):
        done = infer(served, pictures, tmp_path / name, *flags)
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
    found = [one["generated_token_text"] for one in by_hf]
    assert found == answers_by_the_card(served.model, pictures)
    assert len(found) == NUM_IMAGES
    files = [pictures / record.images[0] for record in coordexp.load_records(pictures / "val.jsonl")]
    with coordexp.Detector.from_pretrained(served.model, max_new_tokens=NUM_TOKENS) as detector:
        detected = detector(files, readout="argmax", guided=False)
    assert [one.text for one in detected] == [one["text"] for one in by_hf]
    assert len({tuple(answer) for answer in found}) > NUM_IMAGES // 2, "the pictures change nothing"


def test_the_audit_asks_the_server_too(served: Served, scenes: Path, tmp_path: Path) -> None:
    """Prompt ids, the pictures as they are sent, and greedy answers; a server of another model is noticed by these."""
    from coordexp.models.tiny import build_tiny_model

    build_tiny_model(tmp_path / "other", preset="nano", seed=1)
    found = {}
    for name, model in (("same", served.bare), ("other", tmp_path / "other")):
        (tmp_path / name).mkdir(exist_ok=True)
        output = tmp_path / name / "findings.json"
        done = run_coordexp(
            "audit", run_file(tmp_path / name, model), scenes / "train.jsonl", "--samples", 4, "--recipe-only",
            "--max-new-tokens", 16, "--base-url", f"{served.url}/v1", "--served-model", "model", "--output", output,
        )  # fmt: skip
        assert done.returncode == (0 if name == "same" else 1), done.stdout[-3000:] + done.stderr[-3000:]
        lines = json.loads(output.read_text())["findings"]
        found[name] = {one["area"]: one for one in lines if one["question"] == "openai = hf"}
    assert {area: one["passed"] for area, one in found["same"].items()} == dict.fromkeys(
        ("prompts", "pixels", "answers"), True
    )
    assert found["same"]["prompts"]["detail"] == "4 prompts, by the ids that the backend returns"
    assert {area for area, one in found["other"].items() if one["passed"] is False} == {"answers"}

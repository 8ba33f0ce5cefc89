"""What `coordexp model export` writes beside the weights, and what it refuses. Answers: test_openai_vllm.py."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file
from transformers import AutoTokenizer, GenerationConfig

from coordexp.cli.main import main
from coordexp.codec.schema import IM_END
from coordexp.config import Prompt
from coordexp.config.prompt import PROMPT_FILE, write_prompt
from coordexp.files import write_json


@pytest.fixture
def checkpoint(nano: Path, tmp_path: Path) -> Path:
    """A whole model as training leaves it, with the generation settings of a chat model."""
    folder = tmp_path / "checkpoint-7"
    folder.mkdir()
    for file in nano.iterdir():
        (folder / file.name).symlink_to(file)
    (folder / "generation_config.json").unlink()
    chat = {
        "do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.8, "repetition_penalty": 1.05,
        "eos_token_id": 3, "pad_token_id": 3,
    }  # fmt: skip
    write_json(folder / "generation_config.json", chat)
    write_prompt(folder, Prompt(user="Find all.", max_pixels=4096))
    (folder / "optimizer.pt").write_bytes(b"not to be handed over")
    return folder


def test_the_folder_is_whole_and_asks_greedily(checkpoint: Path, nano: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert main(["model", "export", str(checkpoint), "--out", str(out), "--name", "detector"]) == 0
    left_out = {"optimizer.pt"} | {path.name for path in nano.iterdir() if path.name.startswith(".")}
    stamps = {path.name for path in checkpoint.iterdir()} - {path.name for path in out.iterdir()}
    assert {path.name for path in out.iterdir()} == {path.name for path in checkpoint.iterdir()} - stamps | {
        "README.md"
    }
    assert stamps >= left_out
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", PROMPT_FILE):
        assert (out / name).read_bytes() == (checkpoint / name).read_bytes()
    ours, theirs = load_file(out / "model.safetensors"), load_file(nano / "model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(ours[key].equal(theirs[key]) for key in ours)
    im_end = AutoTokenizer.from_pretrained(out).convert_tokens_to_ids(IM_END)
    kept = GenerationConfig.from_pretrained(out)
    assert (kept.do_sample, kept.eos_token_id, kept.pad_token_id) == (False, [im_end, 3], 3)
    written = json.loads((out / "generation_config.json").read_text())
    assert written.keys() & {"temperature", "top_k", "top_p", "repetition_penalty"} == set()
    card = (out / "README.md").read_text()
    assert "# detector\n" in card
    assert '{"type": "text", "text": "Find all."}' in card
    assert "## Training" not in card  # nothing says how it was trained


def test_adapters_need_to_be_merged_and_nothing_is_left_of_a_refusal(
    checkpoint: Path, tmp_path: Path, capsys
) -> None:
    write_json(checkpoint / "adapter_config.json", {"base_model_name_or_path": str(checkpoint)})
    before = sorted(tmp_path.iterdir())
    for source, message in (
        (checkpoint, "holds an adapter, which other tools do not load; add --merge."),
        (tmp_path, "holds neither resolved_config.json"),
    ):
        assert main(["model", "export", str(source), "--out", str(tmp_path / "out")]) == 2
        assert message in capsys.readouterr().err
    (checkpoint / "adapter_config.json").unlink()
    write_json(tmp_path / "other" / "metrics.json", {"num_images": 1})
    write_json(tmp_path / "other" / "infer_run.json", {"model_hash": "0", "model": "another"})
    flags = ["--out", str(tmp_path / "out"), "--eval", str(tmp_path / "other")]
    assert main(["model", "export", str(checkpoint), *flags]) == 2
    assert "was made with another, whose files are not those of" in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == sorted([*before, tmp_path / "other"])

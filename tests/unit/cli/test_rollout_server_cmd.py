"""`coordexp rollout-server`: engine arguments are checked before anything is loaded."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from coordexp.cli.main import main
from coordexp.config import Prompt
from coordexp.config.prompt import write_prompt


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ('{"dtype": "float16", "seed": 1}', "--engine-args: dtype, seed cannot be set here"),
        ('{"max_num_batched_token": 8}', "did you mean max_num_batched_tokens?"),
    ],
)
def test_engine_args_are_checked(tmp_path: Path, capsys, arguments: str, said: str) -> None:
    pytest.importorskip("vllm", reason="vLLM is not installed")
    assert main(["rollout-server", "--model", str(tmp_path), "--engine-args", arguments]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("arguments", ["[1]", "{max: 1}"])
def test_engine_args_are_a_json_object(tmp_path: Path, capsys, arguments: str) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["rollout-server", "--model", str(tmp_path), "--engine-args", arguments])
    assert stopped.value.code == 2
    assert "--engine-args" in capsys.readouterr().err


def test_a_template_that_writes_another_prompt_than_trained_is_refused_with_both_texts(
    nano: Path, tmp_path: Path, capsys
) -> None:
    """Before the engine is started."""
    pytest.importorskip("vllm", reason="vLLM is not installed")
    model = tmp_path / "model"
    shutil.copytree(nano, model)
    write_prompt(
        model, Prompt(user="Find all.", system="You detect.", rendered="<|im_start|>user\nFind all.")
    )
    assert main(["rollout-server", "--model", str(model), "--port", "18973", "--group-port", "18974"]) == 2
    said = capsys.readouterr().err
    assert f"{model}/coordexp_prompt.json: the model was trained with another text of its prompt" in said
    assert "Trained: '<|im_start|>user\\nFind all.'." in said
    written = "<|im_start|>system\\nYou detect.<|im_end|>\\n<|im_start|>user\\n<|vision_start|><|image_pad|>"
    assert f"Written here: '{written}" in said

"""`coordexp rollout-server`: engine arguments are checked before anything is loaded."""

from __future__ import annotations

from pathlib import Path

import pytest

from coordexp.cli.main import main


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

"""What importing the plugin does in a worker, and how errors raised on purpose end a process."""

from __future__ import annotations

import io
import json
import multiprocessing
import shutil
import sys
from contextlib import redirect_stderr
from pathlib import Path

import pytest
from torch.utils.data import DataLoader, Dataset

from coordexp.config import Prompt
from coordexp.config.prompt import write_prompt
from coordexp.errors import ConfigError, RecordError
from coordexp.trainers.activate import activate_from_argv, end_in_one_line


def test_a_worker_reads_no_data(nano: Path, monkeypatch: pytest.MonkeyPatch):
    """ms-swift imports the plugin again in spawned workers, with the command line of the run."""
    flags = ["--model", str(nano), "--dataset", "gone.jsonl", "--custom_trainer_variant", "stage1_coord"]
    monkeypatch.setattr(sys, "argv", ["/somewhere/swift/cli/sft.py"])
    with pytest.raises(ConfigError, match=r"gone\.jsonl"):
        activate_from_argv(flags)
    monkeypatch.setitem(multiprocessing.current_process()._config, "daemon", True)
    activate_from_argv(flags)


def test_a_form_that_comes_with_the_model_must_go_with_the_objective(
    nano: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The run says nothing about answers; its model writes numbers, which the default objective cannot see."""
    model = tmp_path / "model"
    shutil.copytree(nano, model)
    write_prompt(model, Prompt(answer_form="qwen"))
    flags = ["--model", str(model), "--dataset", "gone.jsonl", "--custom_trainer_variant", "stage1_coord"]
    monkeypatch.setattr(sys, "argv", ["/somewhere/swift/cli/sft.py"])
    with pytest.raises(ConfigError, match=r"custom\.coord_soft_ce_w1: is a loss on coordinate tokens"):
        activate_from_argv(flags)
    plain = json.dumps({"custom": {"coord_soft_ce_w1": {"enabled": False}}})
    with pytest.raises(ConfigError, match=r"gone\.jsonl"):
        activate_from_argv([*flags, "--coordexp", plain])


class Broken(Dataset[int]):
    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> int:
        raise RecordError("train.jsonl:7: is too long")


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_bad_record_ends_in_one_line(num_workers: int, capfd: pytest.CaptureFixture[str]):
    with pytest.raises(RecordError) as caught:
        next(iter(DataLoader(Broken(), num_workers=num_workers)))
    capfd.readouterr()
    with (
        pytest.raises(SystemExit) as ended,
        redirect_stderr(io.StringIO()),
    ):  # as torch's hook of process groups does
        end_in_one_line(caught.type, caught.value, caught.tb)
    assert ended.value.code == 2
    assert capfd.readouterr().err == "coordexp: train.jsonl:7: is too long\n"

"""`coordexp config ...` and `coordexp metrics ...` in a process of their own: quick, without torch, exit codes."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from coordexp.config.reference import render_reference as render_config_reference
from coordexp.metrics.reference import explain
from coordexp.metrics.reference import render_reference as render_metrics_reference
from coordexp.telemetry.rules.reference import render_rules

ROOT = Path(__file__).parents[3]
WITHOUT_TORCH = (
    "import sys; sys.modules['torch'] = None; from coordexp.cli.main import main; sys.exit(main())"
)


def coordexp(*argv: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """`coordexp ARGV` where importing torch fails."""
    command = [sys.executable, "-c", WITHOUT_TORCH, *argv]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=cwd, env=env, text=True, capture_output=True, check=False)


def test_every_shipped_file_is_valid_and_checked_in_under_two_seconds() -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    result = coordexp("config", "check", "configs")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1].endswith(" 0 wrong")
    processor_seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert processor_seconds < 2.0


def test_check_goes_through_all_files_and_exits_2(tmp_path: Path) -> None:
    (tmp_path / "accelerate").mkdir()
    (tmp_path / "accelerate" / "two_ranks.yaml").write_text("num_processes: 2\n")
    (tmp_path / "good.yaml").write_text("model: m\n")
    (tmp_path / "bad.yml").write_text("model: m\nmax_step: 3\n")
    result = coordexp("config", "check", str(tmp_path))
    assert result.returncode == 2
    assert result.stdout.splitlines() == [f"{tmp_path}/good.yaml: ok", "2 files, 1 wrong"]
    assert "max_step in" in result.stderr
    assert "did you mean max_steps?" in result.stderr


def test_paths_that_do_not_exist_are_warnings_or_errors(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").touch()
    file = tmp_path / "run.yaml"
    file.write_text(
        "model: ./weights\ndataset: [train.jsonl]\nexternal_plugins: [coordexp/plugin.py]\n"
        "custom_trainer_variant: stage1\ntuner_type: full\n"
    )
    said = f'model = "./weights" in {file}:1: does not exist.'
    checked = coordexp("config", "check", str(file), cwd=tmp_path)
    assert (checked.returncode, checked.stderr) == (0, f"{file}: warning: {said}\n")
    strict = coordexp("config", "check", "--paths", str(file), cwd=tmp_path)
    assert (strict.returncode, strict.stderr) == (2, f"{file}: {said}\n")
    (tmp_path / "weights").mkdir()
    assert coordexp("config", "check", "--paths", str(file), cwd=tmp_path).returncode == 0


def test_training_does_not_start_without_its_files(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("model: m\ndataset: [train.jsonl]\n")
    started = coordexp("train", "run.yaml", cwd=tmp_path)
    assert (started.returncode, started.stdout) == (2, "")
    assert started.stderr == 'coordexp train: dataset = "train.jsonl" in run.yaml:2: does not exist.\n'
    assert coordexp("train", "--dry-run", "run.yaml", cwd=tmp_path).returncode == 0


def test_check_of_an_empty_folder_exits_2(tmp_path: Path) -> None:
    result = coordexp("config", "check", str(tmp_path))
    assert (result.returncode, "no YAML files" in result.stderr) == (2, True)


def test_show_prints_each_value_with_its_source(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("model: {model: m}\ntraining:\n  effective_batch_size: 8\ncustom:\n  head: plain\n")
    result = coordexp("config", "show", str(file), "--max_steps", "3", "--set", "custom.prompt=Find.")
    assert result.returncode == 0, result.stderr
    rows = {line.split()[0]: line.split(maxsplit=2)[1:] for line in result.stdout.splitlines()}
    assert rows["swift.model"] == ['"m"', f"{file}:1"]
    assert rows["swift.max_steps"] == ["3", "command line"]
    assert rows["swift.gradient_accumulation_steps"] == ["8", f"{file}:3 (training.effective_batch_size)"]
    assert rows["custom.head"] == ['"plain"', f"{file}:5"]
    assert rows["custom.prompt"] == ['"Find."', "command line"]
    assert rows["custom.object_ordering"] == ['"sorted"', "default"]
    assert rows["derived.effective_batch_size"] == ["8", "derived"]
    assert len(rows["config_hash"][0]) == 64


def test_show_as_json_is_the_resolved_config(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("model: m\ncoordexp: {custom: {head: plain}}\n")
    result = coordexp("config", "show", "--json", str(file))
    content = json.loads(result.stdout)
    assert content["custom"]["head"] == "plain"
    assert content["sources"]["custom.head"] == f"{file}:2"


def test_explain_prints_an_entry_and_refuses_unknown_keys() -> None:
    result = coordexp("metrics", "explain", "eval_coord_diag/w1")
    assert result.returncode == 0
    assert result.stdout.startswith("eval_coord_diag/w1\n  meaning")
    assert "mean over coordinate tokens" in result.stdout
    wrong = coordexp("metrics", "explain", "coord_diag/los")
    assert wrong.returncode == 2
    assert "did you mean coord_diag/loss?" in wrong.stderr


def test_explain_of_a_replaced_key_names_its_successor() -> None:
    result = coordexp("metrics", "explain", "obj/B_coord/bbox_ciou")
    assert result.returncode == 2
    assert "it was replaced by loss/B_coord/bbox_ciou" in result.stderr


def test_explain_says_the_whole_entry() -> None:
    assert explain("rollout/f1").splitlines() == [
        "rollout/f1",
        "  meaning      2 matched / (predicted + ground truth). The usual `metric_for_best_model`.",
        "  unit         fraction",
        "  kind         rate",
        "  better       higher",
        "  reduced by   ratio over predicted plus ground-truth objects",
        "  in the loss  no",
        "  present on   steps with a rollout",
        "  logged by    coordexp",
    ]


def test_metrics_explain_tells_the_healthy_range_and_the_rules(capsys):
    from coordexp.cli.main import main

    assert main(["metrics", "explain", "coord_diag/coord_vocab_mass", "eval_rollout/f1"]) == 0
    first, second = capsys.readouterr().out.split("\n\n")
    assert first.splitlines()[-2:] == [
        "  healthy      at least 0.95, from step 200",
        "  rules        coord_mass_low (< 0.9)",
    ]
    assert second.splitlines()[-1] == "  rules        f1_fell (< best - 0.1), stalled (<= best)"


@pytest.mark.parametrize(
    ("page", "render"),
    [
        ("runbooks/metrics.md", render_metrics_reference),
        ("runbooks/config.md", render_config_reference),
        ("runbooks/rules.md", render_rules),
    ],
)
def test_the_printed_reference_is_current(page: str, render) -> None:
    command = f"coordexp {Path(page).stem} write-reference"
    assert (ROOT / page).read_text() == render(), f"run `{command}`"


def test_references_are_written_where_asked(tmp_path: Path) -> None:
    for command in ("config", "metrics"):
        result = coordexp(command, "write-reference", "--output", str(tmp_path / f"{command}.md"))
        assert result.returncode == 0, result.stderr
        assert (tmp_path / f"{command}.md").read_text() == (ROOT / "runbooks" / f"{command}.md").read_text()

"""Token metrics in real `swift sft` runs: both heads, packed or padded, no host sync, bad batches. About 90 s."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from support.processes import PLUGIN, run_swift, sft_flags

from coordexp.metrics.catalog import all_specs, lookup
from coordexp.trainers.activate import activate_from_argv
from coordexp.trainers.runtime import active

pytestmark = pytest.mark.slow

WATCH = Path(__file__).parent / "watch_steps_plugin.py"
TYPES = {"enabled": True, "include": ["scenes"]}
TOKEN_KEYS = {spec.key for spec in all_specs() if spec.family.startswith(("token_acc", "text_token", "<type>"))} | {
    spec.key for spec in all_specs() if spec.key.startswith("coord_monitor/")
}  # fmt: skip


def train(
    model: Path, data: Path, output: Path, settings: dict, *, callbacks: str = "forbid_sync",
    environment: dict[str, str] | None = None, **flags: object,
) -> subprocess.CompletedProcess[str]:  # fmt: skip
    common: dict[str, object] = {
        "max_steps": 2, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "eval_strategy": "steps",
        "eval_steps": 2, "train_dataloader_shuffle": False, "external_plugins": [PLUGIN, WATCH],
        "callbacks": callbacks, "coordexp": json.dumps(settings),
    }  # fmt: skip
    return run_swift("sft", *sft_flags(model, data, output, **common | flags), **(environment or {}))


def trained(*args, **kwargs) -> Path:
    done = train(*args, **kwargs)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return args[2]


def records(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()][1:]


def token_numbers(run: Path) -> list[dict[str, float]]:
    """Of every record with a loss, the token metrics under their training names."""
    found = []
    for record in records(run):
        named = {key.removeprefix("eval_"): value for key, value in record["metrics"].items()}
        if "loss" in named:
            found.append({key: value for key, value in named.items() if key in TOKEN_KEYS})
    return found


@pytest.fixture(scope="module")
def runs(nano_model: Path, scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same run through both heads, every step of them without a host sync of ours."""
    folder = tmp_path_factory.mktemp("token_metrics")
    return {
        head: trained(
            nano_model, scenes, folder / head, {"custom": {"head": head, "token_type_metrics": TYPES}}
        )
        for head in ("plain", "fused")
    }


def test_all_token_metrics_leave_in_train_and_eval(runs):
    for run in runs.values():
        assert [record["mode"] for record in records(run)] == ["train", "train", "eval", "train"]
        assert [numbers.keys() for numbers in token_numbers(run)] == [TOKEN_KEYS] * 3


def test_both_heads_log_the_same(runs):
    for plain, fused in zip(*map(token_numbers, runs.values()), strict=True):
        assert fused == pytest.approx(plain, rel=1e-4, abs=1e-6)


def test_numbers_fit_together(runs):
    for numbers in token_numbers(runs["plain"]):
        frac = {kind: numbers[f"{kind}_token_frac"] for kind in ("desc", "format", "coord")}
        assert sum(frac.values()) == pytest.approx(1.0)
        for top in ("", "_top5"):
            split = sum(share * numbers[f"{kind}_token_acc{top}"] for kind, share in frac.items())
            assert split == pytest.approx(numbers[f"token_acc{top}"], abs=1e-6)
        text = sum(frac[kind] * numbers[f"{kind}_token_acc"] for kind in ("desc", "format"))
        assert text / (1 - frac["coord"]) == pytest.approx(numbers["text_token_acc"], abs=1e-6)
        assert numbers["token_acc_top5"] >= numbers["token_acc"]


def test_every_key_of_every_file_is_in_the_catalogue(runs):
    for run in runs.values():
        keys = {key for record in records(run) for key in record["metrics"]}
        lines = [json.loads(line) for line in (run / "logging.jsonl").read_text().splitlines()]
        logged = [line for line in lines if "epoch" in line]  # the last line is ms-swift's summary of the run
        assert len(logged) == len(lines) - 1
        keys |= {key for line in logged for key in line}
        assert sorted(key for key in keys if lookup(key) is None) == []


def test_packed_run_logs_the_same_token_metrics(nano_model, scenes, tmp_path, runs):
    settings = {"custom": {"token_type_metrics": TYPES}, "training": {"packing": True}}
    run = trained(
        nano_model, scenes, tmp_path / "out", settings, packing_length=260,
        per_device_train_batch_size=1, gradient_accumulation_steps=8,
    )  # fmt: skip
    # All 8 samples are in every step of both runs, in packs or padded.
    assert records(run)[0]["metrics"]["train/samples_total"] == 8
    assert records(run)[0]["metrics"]["pack/num_samples"] > 1
    assert token_numbers(run)[0] == pytest.approx(token_numbers(runs["plain"])[0], rel=1e-4, abs=1e-6)


def test_a_host_sync_of_ours_would_have_been_noticed(nano_model, scenes, tmp_path):
    # Debug mode compares the loss with its parts on the host, in every step.
    done = train(nano_model, scenes, tmp_path / "out", {"debug": {"enabled": True}})
    assert done.returncode != 0
    assert "HostSyncError: Tensor.__float__ in stage1" in done.stderr


def test_bad_batches_are_left_out_and_counted(nano_model, scenes, tmp_path):
    weights = tmp_path / "weights"
    settings = {
        "custom": {"on_nonfinite_loss": "skip_step", "token_type_metrics": {**TYPES, "exclude": ["x*"]}}
    }
    done = train(
        nano_model, scenes, tmp_path / "out", settings, callbacks="spoil",
        environment={"WEIGHTS_FILE": str(weights), "SPOIL_TYPES": "1"}, max_steps=3, eval_strategy="no",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    first, second, third = [
        r["metrics"] for r in records(tmp_path / "out") if "base_ce/noncoord_tokens" in r["metrics"]
    ]

    # Both micro-batches of step 1 have labels that do not line up: one warning, training goes on.
    assert first["health/token_types_skipped_total"] == 2
    assert first.keys() & TOKEN_KEYS == {"token_acc"}
    assert done.stderr.count("its tokens have no types") + done.stdout.count("its tokens have no types") == 1
    assert third.keys() >= TOKEN_KEYS

    # The loss of step 2 is NaN: no update, one step counted, its samples named.
    before, after_1, after_2, after_3 = weights.read_text().splitlines()
    assert before != after_1 == after_2 != after_3
    assert second["health/nonfinite_loss_total"] == 1
    assert "health/nonfinite_loss_total" not in third.keys() | first.keys()
    assert third["loss"] > 0
    said = done.stderr + done.stdout
    assert said.count("The step is skipped") == 1
    assert f"step 2 (rank 0, micro-batch 0: text, coord, of {scenes / 'train.jsonl'}:" in said


def test_a_dataset_that_is_not_included_is_said_at_the_start(
    nano_model, scenes, tmp_path, monkeypatch, caplog
):
    monkeypatch.setattr(sys, "argv", ["/somewhere/swift/cli/sft.py"])
    argv = sft_flags(
        nano_model, scenes, tmp_path / "out",
        coordexp=json.dumps({"custom": {"token_type_metrics": {"enabled": True}}}),
    )  # fmt: skip
    activate_from_argv(argv)
    assert active().sections.custom.token_type_metrics.include == ["lvis"]
    [message] = [
        record.getMessage() for record in caplog.records if "token_type_metrics" in record.getMessage()
    ]
    assert "datasets found: scenes; include: ['lvis']" in message

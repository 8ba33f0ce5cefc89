"""What reports say of a latent prefix: the facts of a run that was asked with one, and other prompts beside it."""

from __future__ import annotations

import re
from html import unescape
from pathlib import Path

import pytest
from support.scored_runs import make_run

from coordexp.cli.main import main
from coordexp.eval.predictions.artifacts import RUN_META
from coordexp.eval.report.write import ReportOptions, write_report
from coordexp.eval.trained.latents import prompt_facts, prompt_rows
from coordexp.files import read_json, write_json
from coordexp.metrics.payload import build_payload
from coordexp.metrics.sinks import MetricsSink

QUICK = ReportOptions(num_worst=1, num_best=1, num_resamples=0)
ALWAYS = {"eval_latent/text_nll_per_token": 0.5, "eval_latent/majority_first_token": 0.25}
ONCE = {
    "eval_latent/none_nll_per_token": 2.25,
    "eval_latent/none_first_token_acc": 0.25,
    "eval_latent/cut_nll_per_token": 1.75,
    "eval_latent/cut_first_token_acc": 0.375,
}


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    """A training run with a latent prefix: evaluated after 10, 20 and 30 steps; step 20 again, after it was resumed."""
    run = tmp_path / "trained"
    sink = MetricsSink(run, meta={"config_hash": "h"})
    sink.write(build_payload("train", 10, {"latent/nll_per_token": 9.0}))
    for step, nll, right, text in ((10, 1.5, 0.5, 0.875), (20, 1.25, 0.625, 0.9), (20, 1.125, 0.75, 0.9)):
        numbers = {"eval_latent/nll_per_token": nll, "eval_latent/first_token_acc": right}
        numbers |= ALWAYS | {"eval_latent/text_first_token_acc": text}
        sink.write(build_payload("eval", step, numbers | (ONCE if step == 10 else {})))
    sink.write(build_payload("eval", 30, {"eval_rollout/f1": 0.5}))  # the model's answers alone
    return run


def test_the_vectors_stand_beside_other_prompts(trained: Path):
    assert [tuple(row) for row in prompt_rows(trained)] == [
        ("the latent vectors", 1.125, 0.75, 20),
        ("the text of the prompt", 0.5, 0.9, 20),
        ("as many first tokens of the text", 1.75, 0.375, 10),
        ("no list", 2.25, 0.25, 10),
        ("nothing: the most frequent first token", None, 0.25, 20),
    ]
    assert prompt_rows(trained, 10)[0] == ("the latent vectors", 1.5, 0.5, 10)
    (trained / "checkpoint-10").mkdir()
    (trained / "best").symlink_to("checkpoint-10")
    for checkpoint in ("checkpoint-10", "best"):
        facts = prompt_facts(trained / checkpoint)
        assert facts["answers after the latent vectors"] == (
            "1.5000 nats a token, 50.0% of first tokens right (step 10)"
        )
    assert prompt_rows(trained.parent) == []


def facts_of(page: str) -> dict[str, str]:
    return {name: unescape(value) for name, value in re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", page)}


def test_the_report_of_a_run_that_was_asked_with_vectors_says_what_they_are_worth(
    trained: Path, tmp_path: Path
):
    run = make_run(tmp_path / "eval", seed=1, noise=0.05, data=tmp_path)
    asked = {"latents": {"num_latents": 8, "keep_prob": 0.85}, "model": str(trained / "checkpoint-20")}
    write_json(run / RUN_META, read_json(run / RUN_META) | asked)
    write_report([run], tmp_path / "report.html", options=QUICK, json_path=tmp_path / "report.json")
    facts = facts_of((tmp_path / "report.html").read_text())
    assert facts["latent prefix"] == "num_latents 8, keep_prob 0.85"
    said = {name.removeprefix("answers after "): v for name, v in facts.items() if name.startswith("answers")}
    assert said == {
        "the latent vectors": "1.1250 nats a token, 75.0% of first tokens right (step 20)",
        "the text of the prompt": "0.5000 nats a token, 90.0% of first tokens right (step 20)",
        "as many first tokens of the text": "1.7500 nats a token, 37.5% of first tokens right (step 10)",
        "no list": "2.2500 nats a token, 25.0% of first tokens right (step 10)",
        "nothing: the most frequent first token": "25.0% of first tokens right (step 20)",
    }
    (in_json,) = read_json(tmp_path / "report.json")["runs"]
    assert {f"answers after {name}": value for name, value in said.items()}.items() <= in_json[
        "facts"
    ].items()


def test_the_report_of_a_run_that_was_asked_in_cut_text_says_so(tmp_path: Path):
    run = make_run(tmp_path / "eval", seed=1, noise=0.05, data=tmp_path)
    write_json(run / RUN_META, read_json(run / RUN_META) | {"cut_prompt": 8})
    write_report([run], tmp_path / "report.html", options=QUICK)
    facts = facts_of((tmp_path / "report.html").read_text())
    assert facts["prompt cut to"] == "8 tokens"
    assert "latent prefix" not in facts
    assert not any(name.startswith("answers after") for name in facts)


def cells(page: str) -> dict[str, list[str]]:
    rows = re.findall(r'<tr data-prompt="(.*?)">(.*?)</tr>', page)
    return {unescape(name): re.findall(r"<td>(.*?)</td>", row) for name, row in rows}


def test_a_training_run_with_a_prefix_has_a_page_of_its_own(trained: Path, tmp_path: Path, capsys):
    page = tmp_path / "page.html"
    assert main(["report", str(trained), "--output", str(page)]) == 0
    assert "the latent prefix beside other prompts" in capsys.readouterr().out
    assert cells(page.read_text()) == {
        "the latent vectors": ["1.1250", "75.0%", "20"],
        "the text of the prompt": ["0.5000", "90.0%", "20"],
        "as many first tokens of the text": ["1.7500", "37.5%", "10"],
        "no list": ["2.2500", "25.0%", "10"],
        "nothing: the most frequent first token": ["–", "25.0%", "20"],
    }


def test_the_page_of_stages_holds_the_table_of_each_stage_with_a_prefix(trained: Path, tmp_path: Path):
    (tmp_path / "text").mkdir()
    stages = [
        {"stage": name, "outcome": "accepted", "accepted": True, "last_step": 20, "best": None}
        for name in ("text", "trained")
    ]
    for stage in stages:
        write_json(tmp_path / stage["stage"] / "verdict.json", stage)
    write_json(tmp_path / "verdict.json", {"accepted": True, "stages": stages})
    for folder in (tmp_path, trained):
        page = tmp_path / "page.html"
        assert main(["report", str(folder), "--output", str(page)]) == 0
        text = page.read_text()
        assert cells(text)["no list"] == ["2.2500", "25.0%", "10"]
        assert text.count("<caption>") == 1  # the stage that reads its text has none
        assert text.index('data-stage="trained"') < text.index("<caption>")

"""`swift rlhf` on our data: its rows, the registered reward functions, and what its command line is refused for."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from swift.rewards import orms
from transformers import AutoTokenizer

from coordexp.codec.forms.choose import FORMS, form_of
from coordexp.codec.records import Record
from coordexp.codec.schema import BoxObject
from coordexp.codec.serialize import serialize
from coordexp.config import Prompt
from coordexp.config.contradictions.rlhf import REWARDS as CHECKED_NAMES
from coordexp.data.dataset import RECORD_COLUMN, RowMaker
from coordexp.data.store.columns import batch_of, record_text
from coordexp.errors import ConfigError, ContractError
from coordexp.eval.rewards import REWARDS
from coordexp.trainers.activate import activate_from_argv
from coordexp.trainers.rlhf.rewards import register_rewards
from coordexp.trainers.rlhf.rows import TaughtRows

CAT = BoxObject("cat", "bbox_2d", (100, 100, 600, 600))
DOG = BoxObject("dog", "bbox_2d", (0, 0, 300, 300))
ANSWER = serialize([DOG, CAT])  # in the order in which they are taught
RECORD = Record(("a.png",), 64, 64, (CAT, DOG), file="/data/train.jsonl", line=1)


def test_a_teacher_is_asked_with_the_objects_and_the_student_as_ever():
    maker = RowMaker(Prompt(user="Find all.", system="Be exact."))
    columns = batch_of([RECORD], ["data"]).to_pydict()
    rows = TaughtRows(maker, "Find all. They are {answer}.")(columns)
    assert rows.pop("teacher_prompt") == [f"<image>Find all. They are {ANSWER}."]
    assert rows == maker(columns)
    assert [turn["content"] for turn in rows["messages"][0]] == ["Be exact.", "<image>Find all.", ANSWER]
    last = TaughtRows(RowMaker(Prompt(media_order="text_first")), "{answer}")(columns)
    assert last["teacher_prompt"] == [ANSWER + "<image>"]


@pytest.fixture(scope="module")
def tok(nano: Path):
    return AutoTokenizer.from_pretrained(nano)


def test_registered_functions_judge_every_answer_by_its_own_row(tok):
    register_rewards(tok, Prompt())
    texts = [ANSWER, serialize([CAT]), "no", ANSWER]
    columns = {
        "response_token_ids": [tok.encode(text + "<|im_end|>", add_special_tokens=False) for text in texts],
        "finish_reason": ["stop", "stop", "stop", "length"],
        RECORD_COLUMN: [record_text(RECORD)] * 4,
    }
    found = {name: orms[name](args=None)(texts, trainer_state=None, **columns) for name in REWARDS}
    assert found["coordexp_f1"] == pytest.approx([1, 2 / 3, 0, 1])
    assert found["coordexp_iou"] == pytest.approx([1, 2 / 3, 0, 1])
    assert found["coordexp_format"] == [1, 1, 0, 0]
    assert found["coordexp_no_duplicates"] == [1, 1, 0, 1]
    assert {orms[name].__name__ for name in REWARDS} == set(REWARDS)  # the names that ms-swift logs
    one_turn = {**columns, "response_token_ids": [[ids] for ids in columns["response_token_ids"]]}
    assert orms["coordexp_f1"](args=None)(texts, **one_turn) == found["coordexp_f1"]
    with pytest.raises(ContractError, match="2 turns"):
        orms["coordexp_f1"](args=None)(texts, **{**columns, "response_token_ids": [[[1], [2]]] * 4})


@pytest.mark.parametrize("name", FORMS)
def test_answers_are_read_in_the_form_of_the_prompt(tok, name):
    form = form_of(name)
    register_rewards(tok, Prompt(answer_form=name))
    columns = {
        "response_token_ids": [
            tok.encode(form.serialize([DOG, CAT]) + "<|im_end|>", add_special_tokens=False)
        ],
        "finish_reason": ["stop"],
        RECORD_COLUMN: [record_text(RECORD)],
    }
    assert [orms[reward](args=None)([], **columns) for reward in REWARDS] == [[1.0]] * 4


def test_the_checked_names_are_the_registered_ones():
    assert tuple(REWARDS) == CHECKED_NAMES


@pytest.mark.parametrize(
    ("flags", "fragments"),
    [
        (["--reward_funcs", "coordexp_f2"], ("coordexp_f2", "did you mean coordexp_f1?")),
        (["--rlhf_type", "dpo"], ("expected one of grpo, gkd",)),
        (["--rlhf_type", "gkd"], ("custom.teacher_prompt",)),
        (["--rlhf_type", "gkd", "--custom.teacher_prompt", "Find all."], ("{answer}",)),
        (["--custom_trainer_variant", "stage1_coord"], ("follows from rlhf_type",)),
        (["--custom.head", "plain"], ("custom.head", "has no effect with swift rlhf")),
        (["--custom.coord_soft_ce_w1.w1_weight", "2"], ("custom.coord_soft_ce_w1",)),
        (["--num_generation", "4"], ("did you mean --num_generations?",)),
        (["--dataset", "gone.jsonl"], ("gone.jsonl",)),
    ],
)
def test_a_run_that_cannot_be_meant_is_refused(nano: Path, monkeypatch: pytest.MonkeyPatch, flags, fragments):
    monkeypatch.setattr(sys, "argv", ["/somewhere/swift/cli/rlhf.py"])
    given = [] if "--rlhf_type" in flags else ["--rlhf_type", "grpo", "--reward_funcs", "coordexp_iou"]
    with pytest.raises(ConfigError) as caught:
        activate_from_argv(["--model", str(nano), *given, *flags])
    assert all(fragment in str(caught.value) for fragment in fragments), str(caught.value)

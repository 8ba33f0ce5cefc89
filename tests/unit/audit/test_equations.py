"""The audit's second calculation of a step's numbers: hand-worked rollouts, schedules, and what has no equation."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from transformers import get_scheduler

from coordexp.audit.equations import check_equations
from coordexp.audit.findings import DifferenceError
from coordexp.audit.rollout_equations import _oracle, _share_repeated, rollout_equations
from coordexp.audit.run_equations import NOT_RECOMPUTED, DumpedStep, learning_rate, run_equations
from coordexp.codec.token_types import TokenType
from coordexp.config.schema.rollout import RolloutTargets
from coordexp.metrics.catalog import lookup
from coordexp.metrics.keys_stage2 import B_RATIO_REALIZED, STAGE2_CHANNEL_B
from coordexp.targets.roles import TokenRole

SWIFT = {
    "learning_rate": 0.5, "lr_scheduler_type": "linear", "warmup_ratio": 0.1, "warmup_steps": 0, "max_steps": 20,
    "per_device_train_batch_size": 2, "gradient_accumulation_steps": 3, "average_tokens_across_devices": True,
}  # fmt: skip


@pytest.mark.parametrize("name", ["constant", "constant_with_warmup", "linear", "cosine"])
def test_learning_rates_are_those_of_the_schedules_that_run(name: str):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.5)
    schedule = get_scheduler(name, optimizer, num_warmup_steps=2, num_training_steps=20)
    for step in range(21):
        expected = schedule.get_last_lr()[0]
        assert learning_rate({**SWIFT, "lr_scheduler_type": name}, step) == pytest.approx(expected, abs=1e-15)
        optimizer.step()
        schedule.step()


def test_the_rate_of_the_last_step_still_falls():
    """The last record looks one step beyond the schedule."""
    step = stage1_step({}, [plan(step=SWIFT["max_steps"] - 1)])
    for name in ("linear", "cosine"):
        step.config["swift"] = {**SWIFT, "lr_scheduler_type": name}
        values = run_equations(step)
        assert (values["learning_rate"], values["lr/phase"]) == (0.0, 2.0)


def test_what_is_not_recomputed_is_a_short_list_with_reasons():
    shares = ("data", "generation", "forward", "backward", "optimizer", "push", "other")
    clocked = ("time/step_s", "time/first_step_s", *(f"time/share_{part}" for part in shares))
    assert {
        "train_speed(s/it)": "a clock of ms-swift that runs from before the first step",
        "memory(GiB)": "read off the accelerator's allocator",
        "MFU": "made of that clock and of the accelerator's rating",
        "memory/peak_gb": "read off the allocator, or off the system",
        "train/tokens_per_s": "made of the clock of the steps",
        **dict.fromkeys(clocked, "the clock of the steps"),
    } == NOT_RECOMPUTED
    assert all(lookup(key) for key in NOT_RECOMPUTED)


def plan(rank: int = 0, **changes: Any) -> dict[str, Any]:
    """A dumped step without forwards."""
    empty = {
        "step": 0,
        "rank": rank,
        "channel": None,
        "kinds": ["TEACHER_FORCED"],
        "forwards": [],
        "trained": [],
    }
    load = {"is_packed": False, "num_places": 6, "num_tokens": 5, "num_supervised": 0, "num_images": 0}
    return {**empty, "answers": [], "seconds": {}, "load": load, **changes}


def stage1_step(payload: dict[str, float], plans: list[dict[str, Any]]) -> DumpedStep:
    config = {
        "swift": SWIFT, "derived": {"num_train_samples": 10}, "training": {"packing": False},
        "custom": {"coord_soft_ce_w1": {"gate_weight": 0.0, "monitor_mass": False}},
        "stage2_ab": None, "rollout_matching": None,
    }  # fmt: skip
    return DumpedStep(plans, plans, payload, config)


def test_a_number_without_an_equation_is_named():
    plans = [plan()]
    known = {"loss": 0.0} | run_equations(stage1_step({}, plans))
    model, ids_K = nn.Linear(1, 1).double(), torch.arange(3)
    clock = {"train_speed(s/it)": 2.0}
    found = check_equations(stage1_step(known | clock, plans), model, ids_K)
    assert found == (
        f"{len(known)} of {len(known) + 1} numbers; not train_speed(s/it): a clock of ms-swift that runs from before "
        "the first step"
    )
    with pytest.raises(DifferenceError, match=r"no equation says what time/of_day, train/moons should be"):
        check_equations(
            stage1_step(known | clock | {"train/moons": 1.0, "time/of_day": 2.0}, plans), model, ids_K
        )
    with pytest.raises(DifferenceError, match=r"train/samples_seen is 7 in the payload, 0 in float64"):
        check_equations(stage1_step({**known, "train/samples_seen": 7.0}, plans), model, ids_K)
    del known["accum/grad_steps"]
    with pytest.raises(DifferenceError, match=r"accum/grad_steps should be 3, but the payload lacks it"):
        check_equations(stage1_step(known, plans), model, ids_K)


def test_the_rate_of_another_schedule_is_excused_by_its_name():
    step = stage1_step({}, [plan()])
    assert "learning_rate" not in step.excused
    other = copy.deepcopy(step)
    other.config["swift"]["lr_scheduler_type"] = "polynomial"
    assert "the run has polynomial" in other.excused["learning_rate"]
    assert "learning_rate" not in run_equations(other)


def forward(num_samples: int, ids_BT: torch.Tensor) -> dict[str, Any]:
    return {
        "inputs": {"input_ids": ids_BT}, "num_samples": num_samples, "is_filler": False, "num_replaced": 0,
        "types_skipped": 0, "sample_ids": [], "rows": {"targets_R": torch.zeros(5)},
    }  # fmt: skip


def test_progress_over_two_ranks_and_two_steps():
    """10 samples on 2 ranks in batches of 2 are 3 micro-steps of an epoch; an event is counted, none is absent."""
    ids = torch.tensor([[1, 2, 0], [3, 4, 5]])
    broken = {**forward(2, ids), "num_replaced": 1}
    history = [plan(rank, step=0, forwards=[forward(2, ids), forward(2, ids)]) for rank in (0, 1)]
    now = [
        plan(0, step=1, forwards=[broken, {**forward(2, ids), "is_filler": True}]),
        plan(1, step=1, forwards=[]),
    ]
    step = stage1_step({"num_input_tokens_seen": 0.0}, now)
    step.config["swift"]["include_num_input_tokens_seen"] = "non_padding"
    values = run_equations(DumpedStep(now, history + now, step.payload, step.config, pad_token_id=0))
    assert values == {
        "train/samples_total": 2, "train/samples_seen": 10, "train/micro_steps": 1, "accum/current_grad_steps": 1,
        "accum/grad_steps": 3, "epoch": pytest.approx(4 / 3), "num_input_tokens_seen": 25,
        "health/samples_replaced_total": 1, "learning_rate": 0.5, "lr/phase": 2, "train/tokens_total": 5,
        "train/tokens_seen": 25, "train/images_total": 0, "train/images_seen": 0, "packing/mode": 0,
        "packing/utilization": pytest.approx(5 / 6),
    }  # fmt: skip


P, M, F, C, E = (
    int(role)
    for role in (
        TokenRole.PREFIX,
        TokenRole.MATCHED_PREFIX,
        TokenRole.FN_TAIL,
        TokenRole.CLOSURE,
        TokenRole.EOS,
    )
)
S, D, K = int(TokenType.STRUCT), int(TokenType.DESC), int(TokenType.COORD)


def answer(**changes: Any) -> dict[str, Any]:
    """Two of three objects were found, one of them with an equal name; one record was broken."""
    plain = {
        "answer_index": 0,
        "prompt_token_ids": [0] * 5, "num_tokens": 20, "policy_version": 1, "repeat_terminated": False,
        "descs": ["Cat", "dog"], "bins": [[0, 0, 10, 10], [0, 0, 10, 10]],
        "dropped_by_reason": {"malformed": 1}, "truncated": False,
        "prefix_is_fallback": False, "num_gt": 3, "gt_descs": ["cat", "bird", "wolf"], "matched": [[0, 0], [1, 2]],
        "maskious": [0.5, 0.75], "num_candidates": 6, "gating_rejections": 2,
        "target": {
            "prompt_length": 5, "num_matched": 2, "slots": torch.tensor([6, 7, 9]),
            "roles": torch.tensor([0, 0, 0, 0, 0, P, M, M, F, F, F, C, E], dtype=torch.int8),
            "types": torch.tensor([0, 0, 0, 0, 0, S, K, K, D, K, S, S, S], dtype=torch.int8),
        },
    }  # fmt: skip
    return {**plain, **changes}


@pytest.mark.parametrize("b_ratio", [0.1, [[0, 0.1]], [[0, 0.1], [100, 0.1]]])
def test_the_tenth_step_of_a_tenth_is_channel_b(b_ratio: Any):
    """Ten times 0.1, added one after another in floating point, stays below 1."""
    plans = [{"step": 9, "channel": "B", "answers": []}]
    config = {"stage2_ab": {"schedule": {"b_ratio": b_ratio}}}
    values = rollout_equations(DumpedStep(plans, plans, {}, config))
    assert values == {STAGE2_CHANNEL_B: 1.0, B_RATIO_REALIZED: 0.1}


def test_repeated_objects_by_hand():
    """Of five objects the last two repeat earlier ones: by an IoU of 10/11, and a polygon by its box."""
    descs = ["cat", "cat", "dog", "cat", "cat"]
    bins = [[0, 0, 10, 10], [0, 0, 5, 10], [0, 0, 10, 10], [0, 0, 11, 10], [0, 0, 5, 0, 5, 10]]
    assert _share_repeated(answer(descs=descs, bins=bins)) == 2 / 5
    assert _share_repeated(answer(descs=[], bins=[])) == 0


def test_what_several_answers_found_together():
    """Of four objects one answer finds the first two, the other the second and the last."""
    answers = [answer(num_gt=4, matched=[[0, 0], [1, 1]]), answer(num_gt=4, matched=[[0, 1], [1, 3]])]
    other = [answer(num_gt=1, matched=[]), answer(num_gt=1, matched=[])]
    assert _oracle([{"answers": answers}, {"answers": other}], 2) == {"rollout/oracle_recall": 3 / 5}
    assert _oracle([{"answers": answers}], 1) == {}


def test_rollout_numbers_by_hand():
    """Two ranks with one answer each; the second wrote nothing that a target could continue."""
    cut = answer(
        num_tokens=10, descs=[], bins=[],
        dropped_by_reason={"ambiguous": 2}, truncated=True, prefix_is_fallback=True, num_gt=1,
        gt_descs=["cat"], matched=[], maskious=[], num_candidates=0, gating_rejections=0, target=None,
        repeat_terminated=True, prompt_token_ids=[0] * 7,
    )  # fmt: skip
    seconds = [
        {"generate": 2.0, "parse_match": 0.5, "encode": 0.1},
        {"generate": 4.0, "parse_match": 0.25, "encode": 0.2},
    ]
    pack = forward(1, torch.zeros(1, 13, dtype=torch.int64))
    plans = [
        plan(0, step=2, channel="B", answers=[answer()], seconds=seconds[0], forwards=[pack]),
        plan(
            1, step=2, channel="B", answers=[cut], seconds=seconds[1], forwards=[{**pack, "is_filler": True}]
        ),
    ]
    token_ce = {"name": "token_ce", "enabled": True, "weight": 1.0, "channels": ["A", "B"]}
    section = {
        "schedule": {"b_ratio": 0.5},
        "pipeline": {"objective": [{**token_ce, "config": {"rollout_fn_desc_weight": 0.0}}]},
    }
    rollout = {
        "decode_mode": "greedy", "decoding": {"temperature": 0.0, "top_p": 0.9, "top_k": -1}, "packing": True,
        "packing_length": 52, "repeat_terminate": {"enabled": True},
        "desc_monitor": {"enabled": True, "every_steps": 2, "max_pairs": 8, "mode": "exact"},
        "targets": RolloutTargets().model_dump(), "num_return_sequences": 1,
    }  # fmt: skip
    config = {"swift": SWIFT, "stage2_ab": section, "rollout_matching": rollout}
    values = rollout_equations(DumpedStep(plans, plans, {}, config))
    drops = "stage2_ab/channel_b/strict_drop"
    expected = {
        "stage2/channel_b": 1, "stage2_ab/b_ratio_realized": 1 / 3, "stage2/raw_rollouts": 2,
        "rollout/gen_new_tokens_total": 30, "rollout/gen_new_tokens_mean": 15, "rollout/gen_new_tokens_p90": 15,
        "rollout/duplicate_rate_mean": 0, "rollout/duplicate_rate_p99": 0, "rollout/gen_new_tokens_p99": 20,
        "rollout/gen_tokens_per_s": 5, "rollout/repeat_terminate_active": 1,
        "rollout/repeat_terminate_triggered_sequences": 1, "rollout/do_sample": 0, "rollout/temperature": 0,
        "rollout/top_p": 0.9, "rollout/top_k": -1, "rollout/decode_non_beam_count": 2, "rollout/decode_beam_count": 0,
        "rollout/parse_dropped_invalid": 1, "rollout/parse_dropped_ambiguous": 2, "rollout/parse_truncated": 1,
        "rollout/parse_truncated_rate": 0.5, "rollout/parse_obj_total": 5, "rollout/parse_obj_valid_frac": 0.4,
        "rollout/parse_obj_drop_frac": 0.6, "rollout/sample_valid_pred_rate": 0.5, "rollout/sample_any_match_rate": 0.5,
        "rollout/gt_objects_total": 4, "rollout/valid_pred_objects_total": 2, "rollout/matched_for_supervision": 2,
        "rollout/excluded_from_supervision": 0, "rollout/excluded_rate": 0, "rollout/fn_total": 2,
        "rollout/fn_appended_total": 1, "rollout/gating_rejections": 2, "rollout/gating_rejection_rate": 1 / 3,
        "rollout/precision": 1, "rollout/recall": 0.5, "rollout/f1": 2 / 3, "rollout/matched_maskiou_mean": 0.625,
        "rollout/matched_maskiou_count": 2, "rollout/prefix_coord_targets_total": 2,
        "rollout/prefix_coord_targets_per_matched": 1, "rollout/tail_ignore_frac": 1 / 5,
        "rollout/prompt_len_mean": 6, "rollout/prompt_len_p90": 6, "rollout/rollout_len_mean": 15,
        "rollout/rollout_len_p90": 15, "rollout/train_len_mean": 8, "rollout/train_len_p90": 8,
        "rollout/append_len_mean": 5, "rollout/append_len_p90": 5, "rollout/encoded_len_mean": 13,
        "rollout/encoded_len_p90": 13, "time/rollout_generate_s": 4, "time/rollout_parse_match_s": 0.5,
        "time/rollout_teacher_encode_s": 0.2, "packing/post_rollout_fill": 0.25, "packing/post_rollout_segments": 1,
        "packing/post_rollout_buffer": 0, "rollout/desc_pairs_total": 2, "rollout/desc_exact_acc_on_matched": 0.5,
        "rollout/desc_sem_enabled": 0, f"{drops}/N_valid_pred": 2, f"{drops}/N_drop_invalid": 1,
        f"{drops}/reason/malformed": 1, f"{drops}/reason/ambiguous": 2,
        "stage2_ab/channel_b/closure_supervision/N_drop": 1, "stage2_ab/channel_b/invalid_rollout": 1,
    }  # fmt: skip
    assert values.keys() == expected.keys()
    assert values == {key: pytest.approx(value) for key, value in expected.items()}
    assert all(lookup(key) for key in values)

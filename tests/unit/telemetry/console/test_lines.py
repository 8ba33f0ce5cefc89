"""Exact lines of hand-made series of payloads: the four levels, their cadence, marks, colours, labels."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from coordexp.config.schema.telemetry import ConsoleLevels, ConsoleSteps
from coordexp.metrics.payload import Payload, build_payload
from coordexp.telemetry.console.lines import console_lines, remember, written
from coordexp.telemetry.console.view import ConsoleView

STEP = {
    "loss": 1.23456, "base_ce/loss": 0.8, "coord_diag/soft_ce": 1.0, "coord_diag/w1": 0.1, "coord_diag/ce": 0.5,
    "coord_diag/gate": 0.02, "grad_norm": 25.25, "learning_rate": 1e-5, "lr/phase": 0.0, "time/step_s": 0.5,
    "train/tokens_per_s": 15234.0, "train/tokens_total": 30468.0, "train/samples_total": 64.0, "epoch": 0.625,
    "train/tokens_seen": 2_500_000.0, "train/samples_seen": 5000.0, "train/images_seen": 5000.0, "packing/mode": 1.0,
    "packing/utilization": 0.934, "pack/num_samples": 3.25, "memory/peak_gb": 12.34, "time/share_data": 0.02,
    "time/share_forward": 0.4, "time/share_backward": 0.5, "time/share_optimizer": 0.077, "time/share_other": 0.003,
    "token_acc": 0.5,
}  # fmt: skip
WEIGHTS = {"soft_ce": 0.2, "w1": 1.0, "ce": 0.2, "gate": 0.0}
LEVEL_1 = (
    "step {}/400 · loss 1.235 (text 0.8, soft_ce 0.2) · lr 1e-05 warmup · grad norm 25.2 · 15.2k tokens/s · "
    "32 samples/s · 0.5 s/step · 3m 20s left"
)
LEVEL_2 = "  loss: text 0.8 (67%), soft_ce 0.2 (17%), w1 0.1 (8%), ce 0.1 (8%)"
LEVEL_3 = [
    "  schedule: epoch 0.625, warmup, 2.5M tokens, 5k samples, 5k pictures seen",
    "  packing: packed, 93% filled, 3.25 samples a sequence",
    "  memory: 12.3 GB at most",
    "  time: backward 50%, forward 40%, optimizer 8%, data 2%",
]


def said(payloads: list[Payload], view: ConsoleView) -> list[list[str]]:
    """The lines of each payload of a series."""
    history: list[Payload] = []
    series = []
    for payload in payloads:
        lines = console_lines(history, payload, view, remaining="3m 20s")
        history = remember(history, payload)
        series.append([text.plain for text in lines])
    return series


def train(step: int, **numbers: float) -> Payload:
    return build_payload("train", step, {**STEP, **numbers})


def test_levels_come_at_their_cadence_where_there_are_records():
    view = ConsoleView(max_steps=400, coord_weights=WEIGHTS)
    series = said([train(step) for step in (1, 8, 16, 48, 56)], view)
    assert series == [
        [LEVEL_1.format(1)],
        [LEVEL_1.format(8)],
        [LEVEL_1.format(16), LEVEL_2],  # 10 lies between 8 and 16
        [LEVEL_1.format(48), LEVEL_2],
        [LEVEL_1.format(56), LEVEL_2, *LEVEL_3],
    ]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"level": 1}, [[LEVEL_1.format(5)], [LEVEL_1.format(10)]]),
        ({"level": 2}, [[LEVEL_1.format(5)], [LEVEL_1.format(10), LEVEL_2]]),
        (
            {"every_steps": ConsoleSteps(level_1=10, level_2=5, level_3=10)},
            [[LEVEL_2], [LEVEL_1.format(10), LEVEL_2, *LEVEL_3]],
        ),
    ],
)
def test_level_and_cadences_are_settings(settings: dict, expected: list[list[str]]):
    view = ConsoleView(ConsoleLevels(**settings), 400, coord_weights=WEIGHTS)
    assert said([train(5), train(10)], view) == expected


def test_numbers_outside_their_healthy_range_are_marked_and_red():
    def is_healthy(key: str, value: float, step: int) -> bool | None:
        return {"grad_norm": value < 20 or step < 10, "coord_diag/soft_ce": value < 1.0}.get(key)

    view = ConsoleView(ConsoleLevels(level=1), 400, coord_weights=WEIGHTS, is_healthy=is_healthy)
    [early], [late] = said([train(9), train(10)], view)
    assert "(text 0.8, soft_ce 0.2!) · lr 1e-05 warmup · grad norm 25.2 · " in early
    assert "grad norm 25.2! · 15.2k tokens/s" in late  # the range of a term is that of its unweighted number
    [line] = console_lines([], build_payload("train", 10, {"loss": 2.0, "grad_norm": 25.0}), view)
    assert written([line], colours=True, environment={}) == (
        "\x1b[1mstep 10/400\x1b[0m · loss 2 · grad norm \x1b[1;31m25!\x1b[0m"
    )


@pytest.mark.parametrize("environment", [{"NO_COLOR": "1"}, {"TERM": "dumb"}])
def test_no_colours_where_they_are_not_wanted(environment: dict):
    [line] = console_lines([], build_payload("train", 1, {"loss": 2.0}), ConsoleView(max_steps=2))
    assert written([line], colours=True, environment=environment) == "step 1/2 · loss 2"
    assert written([line], colours=False, environment={}) == "step 1/2 · loss 2"


def test_plain_cross_entropy_has_the_shares_of_its_tokens():
    """300 text tokens at 1 nat and 100 coordinates at 2 + 0.4 nats: the mean over 400 is 0.75 + 0.6."""
    numbers = {
        "loss": 1.35, "base_ce/loss": 1.0, "base_ce/noncoord_tokens": 300.0, "coord_diag/coord_tokens": 100.0,
        "coord_diag/ce": 2.0, "coord_diag/gate": 0.4, "coord_diag/soft_ce": 9.0,
    }  # fmt: skip
    [[first, second]] = said(
        [build_payload("train", 10, numbers)], ConsoleView(ConsoleLevels(level=2), max_steps=20)
    )
    assert first == "step 10/20 · loss 1.35 (text 0.75, ce 0.5) · 3m 20s left"
    assert second == "  loss: text 0.75 (56%), ce 0.5 (37%), gate 0.1 (7%)"


def test_the_share_of_the_gradient_stands_beside_that_of_the_loss_where_it_was_measured():
    norms = {"gradient/norm/base_ce/loss": 3.0, "gradient/norm/coord_diag/w1": 1.0}
    view = ConsoleView(ConsoleLevels(level=2), 400, coord_weights=WEIGHTS)
    [[_, atoms]] = said([train(10, **norms)], view)
    assert atoms == (
        "  loss: text 0.8 (67%, 75% of the gradient), soft_ce 0.2 (17%), w1 0.1 (8%, 25% of the gradient), ce 0.1 (8%)"
    )


def test_what_changes_settings_is_said_at_level_3_and_weights_in_force_count():
    numbers = {
        "loss": 1.0, "base_ce/loss": 0.75, "coord_diag/w1": 0.5, "schedule/coord_soft_ce_w1/w1_weight": 0.5,
        "control/width/value": 0.25, "control/width/audit": 1.0, "control/price/value": 2.0,
    }  # fmt: skip
    payload = build_payload("train", 50, numbers, tags={"control/width/value": "[DB] [AUDIT]"})
    [[_, atoms, *state]] = said([payload], ConsoleView(max_steps=400, coord_weights={"w1": 1.0}))
    assert atoms == "  loss: text 0.75 (75%), w1 0.25 (25%)"
    assert state == [
        "  in force: coord_soft_ce_w1/w1_weight 0.5",
        "  controllers: width 0.25 [DB] [AUDIT], price 2",
    ]


def test_stage_2_names_channels_and_what_the_model_wrote():
    both = {
        "loss": 2.0, "stage2/channel_b": 1.0, "loss/A1_text/struct_ce": 0.75, "loss/A2_coord/coord_w1": 0.25,
        "loss/B_rollout_text/struct_ce": 0.5, "loss/B_coord/bbox_ciou": 1.0, "loss/B_coord/coord_w1": 0.5,
        "rollout/f1": 0.25, "rollout/matched_maskiou_mean": 0.7125, "rollout/parse_truncated_rate": 0.125,
        "rollout/duplicate_rate_mean": 0.03, "stage2_ab/b_ratio_realized": 0.3,
    }  # fmt: skip
    only_a = {"loss": 1.0, "stage2/channel_b": 0.0, "loss/A1_text/struct_ce": 0.75}
    series = said(
        [build_payload("train", 50, both), build_payload("train", 51, only_a)], ConsoleView(max_steps=80)
    )
    assert series == [
        [
            "step 50/80 · channel A+B · loss 2 (bbox_ciou 1, struct_ce 0.75) · F1 0.25 · maskIoU 0.713 · "
            "truncated 12%! · duplicates 3% · 3m 20s left",
            "  loss of channel A: struct_ce 0.75 (75%), coord_w1 0.25 (25%)",
            "  loss of channel B: bbox_ciou 1 (50%), struct_ce 0.5 (25%), coord_w1 0.5 (25%)",
            "  schedule: 30% of the steps channel B",
        ],
        ["step 51/80 · channel A · loss 1 (struct_ce 0.75) · 3m 20s left"],
    ]


EVALUATION = {
    "eval_loss": 1.5, "eval_rollout/f1": 0.25, "eval_rollout/recall": 0.4, "eval_rollout/precision": 0.3,
    "eval_rollout/matched_maskiou_mean": 0.6, "eval_rollout/desc_exact_acc_on_matched": 0.9, "eval_runtime": 2.5,
    "eval_coord_diag/expected_bin_mae": 40.0, "eval_coord_softce_w1/loss": 1.0, "eval_rollout/fn": 6.0,
}  # fmt: skip
CHANGED = {
    **EVALUATION, "eval_loss": 1.2, "eval_rollout/f1": 0.35, "eval_rollout/recall": 0.3, "eval_runtime": 9.0,
    "eval_rollout/precision": 0.305, "eval_rollout/matched_maskiou_mean": 0.7, "eval_coord_softce_w1/loss": 0.5,
    "eval_rollout/desc_exact_acc_on_matched": 0.85, "eval_coord_diag/expected_bin_mae": 30.0, "eval_rollout/fn": 7.0,
}  # fmt: skip


def evaluations(*numbers: Mapping[str, float]) -> list[Payload]:
    return [build_payload("eval", 50 * place, one) for place, one in enumerate(numbers, start=1)]


def test_an_evaluation_says_what_got_better_and_worse():
    view = ConsoleView(max_steps=400, best_metric="rollout/f1")
    first, second = said(evaluations(EVALUATION, CHANGED), view)
    assert first == [
        "eval at step 50/400 · loss 1.5 · F1 0.25 · precision 0.3 · recall 0.4 · maskIoU 0.6 · 2.5 s"
    ]
    assert second == [
        "eval at step 100/400 · loss 1.2 · F1 0.35 · precision 0.305 · recall 0.3 · maskIoU 0.7 · 9 s",
        "  since step 50: [F1+] [RECALL-] [BOXES+] [NAMES-] [LOSS+]",  # precision moved by less than 0.01
        "  better: coord_diag/expected_bin_mae 40 -> 30, loss 1.5 -> 1.2, rollout/f1 0.25 -> 0.35, "
        "rollout/matched_maskiou_mean 0.6 -> 0.7",
        "  worse: rollout/recall 0.4 -> 0.3, rollout/desc_exact_acc_on_matched 0.9 -> 0.85",
        "  [BEST] rollout/f1 0.35, best before 0.25 at step 50",
    ]


def test_an_evaluation_is_compared_with_the_best_and_a_stall_is_said():
    view = ConsoleView(max_steps=400, best_metric="rollout/f1")
    _, _, third, fourth, fifth = said(
        evaluations(EVALUATION, CHANGED, EVALUATION, EVALUATION, {**EVALUATION, "eval_rollout/f1": 0.255}),
        view,
    )
    assert third[-1] == "  rollout/f1 0.25, best before 0.35 at step 100"
    assert fourth[1:] == [
        "  since step 150: nothing changed by 0.01 or more",
        "  since the best, step 100: [F1-] [RECALL+] [BOXES-] [NAMES+] [LOSS-]",
        "  rollout/f1 0.25, best before 0.35 at step 100",
    ]
    assert fifth[-1] == (
        "  [STALL] rollout/f1 0.255, best before 0.35 at step 100; evaluations without a better one: 3"
    )


def test_the_best_of_a_number_that_should_fall():
    view = ConsoleView(ConsoleLevels(stall_after=1), 400, best_metric="loss")
    _, second, third = said(evaluations({"eval_loss": 2.0}, {"eval_loss": 1.0}, {"eval_loss": 1.005}), view)
    assert second[1:] == [
        "  since step 50: [LOSS+]",
        "  better: loss 2 -> 1",
        "  [BEST] loss 1, best before 2 at step 50",
    ]
    assert third[1:] == [
        "  since step 100: nothing changed by 0.01 or more",
        "  [STALL] loss 1.005, best before 1 at step 100; evaluations without a better one: 1",
    ]


def test_below_level_4_an_evaluation_is_one_line_and_the_end_is_one():
    view = ConsoleView(ConsoleLevels(level=3), 400, best_metric="rollout/f1")
    end = build_payload("train", 400, {"train_loss": 1.5, "train_runtime": 60.0})
    series = said([*evaluations(EVALUATION, CHANGED), end], view)
    assert [len(lines) for lines in series] == [1, 1, 1]
    assert series[-1] == ["done at step 400/400 · mean loss 1.5 · 60 s"]


def test_the_history_keeps_what_later_lines_need():
    history: list[Payload] = []
    for payload in [train(10), *evaluations(EVALUATION), train(60), *evaluations(CHANGED), train(70)]:
        history = remember(history, payload)
    assert [(one["mode"], one["global_step"], one["metrics"]) for one in history] == [
        ("eval", 50, CHANGED),  # of one step the newest: a resumed run evaluates again
        ("train", 70, STEP),
    ]


def test_a_latent_prefix_says_how_its_steps_were_prompted():
    view = ConsoleView(max_steps=400, coord_weights=WEIGHTS)
    latent = {
        "latent/text_steps": 0.0,
        "latent/first_token_acc": 0.25,
        "latent/nll_per_token": 0.5,
        "latent/keep_prob": 0.85,
        "loss/latent/latent_kd": 0.3,
        "loss/latent/stage1": 0.9,
    }
    ((line, *_),) = said([train(1, **latent)], view)
    assert line.startswith(
        "step 1/400 · prompt L · loss 1.235 (stage1 0.9, kd 0.3) · first token 25% · nll 0.5 · keep 85% · lr 1e-05"
    )
    for share, word in ((1.0, "T"), (0.5, "TL")):
        ((line, *_),) = said([train(1, **{**latent, "latent/text_steps": share})], view)
        assert f" · prompt {word} · " in line

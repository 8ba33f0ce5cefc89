"""The catalogue against a hand-written list of every key, its naming rules, and its words on unknown keys."""

from __future__ import annotations

import ast
import itertools
import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import coordexp
from coordexp.errors import ContractError
from coordexp.metrics import catalog, keys_control, keys_rollout, keys_stage1, keys_stage2
from coordexp.metrics.catalog import Kind, Reduce
from coordexp.metrics.keys_run import GRADIENT, PACE, TIME_STEP, TRAJECTORY
from coordexp.metrics.keys_stage1 import LATENT, LATENT_LOSS

PACKAGE = Path(__file__).resolve().parents[3] / "coordexp"
SOURCES = sorted(path for path in PACKAGE.rglob("*.py") if not path.name.startswith("keys_"))

FIXTURE = Path(__file__).parents[2] / "fixtures" / "metrics" / "reference_keys.txt"


def expand_braces(pattern: str) -> list[str]:
    """`a/{b,c}` -> `a/b`, `a/c`."""
    parts = re.split(r"\{([^}]*)\}", pattern)
    choices = [[part] if i % 2 == 0 else part.split(",") for i, part in enumerate(parts)]
    return ["".join(chosen) for chosen in itertools.product(*choices)]


def reference_rows() -> list[tuple[str, str, bool]]:
    rows = []
    for line in FIXTURE.read_text().splitlines():
        if line.strip() and not line.startswith("#"):
            pattern, reduce, in_loss = line.split()
            rows += [(key, reduce, in_loss == "yes") for key in expand_braces(pattern)]
    return rows


@pytest.mark.parametrize(("key", "reduce", "in_loss"), reference_rows())
def test_every_reference_key_has_its_reduction(key: str, reduce: str, in_loss: bool) -> None:
    spec = catalog.lookup(key)
    assert spec is not None, f"{key} is not in the catalogue"
    assert (spec.key, spec.reduce.value, spec.in_loss) == (key, reduce, in_loss)
    assert all((spec.meaning, spec.when, spec.unit))


def test_every_catalogue_key_of_ours_is_a_reference_key_or_health() -> None:
    reference = {
        key.removeprefix("eval_").replace("dataset/coco/", "dataset/<name>/")
        for key, _, _ in reference_rows()
    }
    reference |= {
        spec.key
        for section in (PACE, TRAJECTORY, GRADIENT, LATENT, LATENT_LOSS, *keys_control.SECTIONS)
        for spec in section
    }  # described in their own place
    extra = {spec.key for spec in catalog.all_specs() if spec.source == "coordexp"} - reference
    assert extra == {
        "loss/B_rollout_text/matched_desc_ce",
        "rollout/f1_50_95",
        "rollout/oracle_recall",
        *keys_rollout.PREFIX_EDITS.values(),
        "rollout/duplicate_rate_mean",
        "rollout/duplicate_rate_p99",
        "rollout/repeat_terminate_active",
        "rollout/repeat_terminate_triggered_sequences",
        "health/nonfinite_metrics_total",
        "health/nonfinite_loss_total",
        "health/oom_retries_total",
        "health/samples_replaced_total",
        "health/token_types_skipped_total",
        "time/rollout_eval_s",
    }


@pytest.mark.parametrize("spec", list(catalog.all_specs()), ids=lambda spec: spec.key)
def test_names_follow_the_naming_rules(spec: catalog.MetricSpec) -> None:
    name = spec.key.rsplit("/", 1)[-1]
    if spec.source == "coordexp":
        if re.search(r"(_total|_count|_sum|_num|_den)$", name) or name.startswith("N_"):
            assert (spec.kind, spec.reduce) == (Kind.COUNTER, Reduce.SUM)
        if re.search(r"(_rate|_frac)$", name) or name in ("precision", "recall", "f1"):
            assert (spec.kind, spec.reduce) == (Kind.RATE, Reduce.RATIO)
        if spec.key.startswith("time/") and name.endswith("_s") and spec.key != TIME_STEP:
            assert (spec.kind, spec.reduce) == (Kind.SECONDS, Reduce.MAX)
        if name.endswith("p99") or spec.kind is Kind.FLAG:
            assert spec.reduce is Reduce.MAX
        if spec.key.startswith("loss/"):
            assert (spec.kind, spec.in_loss) == (Kind.LOSS, True)
    assert not catalog.is_helper(spec.key)


def test_evaluation_keys_fall_back_to_the_training_name() -> None:
    train, evaluated = catalog.lookup("coord_diag/w1"), catalog.lookup("eval_coord_diag/w1")
    assert train is not None
    assert evaluated is not None
    assert evaluated.key == "eval_coord_diag/w1"
    assert (evaluated.unit, evaluated.reduce, evaluated.meaning) == (train.unit, train.reduce, train.meaning)
    assert catalog.lookup("eval_eval_loss") is None


def test_keys_of_one_data_set_have_the_family_of_all() -> None:
    spec = catalog.lookup("eval_dataset/o365-v2/rollout/f1")
    whole = catalog.lookup("rollout/f1")
    assert spec is not None
    assert whole is not None
    assert (spec.key, spec.family) == ("eval_dataset/o365-v2/rollout/f1", "eval_dataset/<name>/rollout/f1")
    assert (spec.kind, spec.reduce, spec.over, spec.better) == (
        whole.kind,
        whole.reduce,
        whole.over,
        whole.better,
    )


@pytest.mark.parametrize(
    "key",
    [
        "loss/A1_text/bbox_ciou",  # an atom that its provenance never carries
        "loss/A2_text/desc_ce",
        "coord_diag/C/acc_top5",
        "stage2_ab/channel_b/strict_drop/reason/other",
        "rollout/_num_samples",
        "eval_rollout/bbox_AP",
        "obj/A1_text/struct_ce",
        "loss/ce",
        "dataset/coco/token_acc",  # nobody tells it by data set
        "dataset/coco",
        "dataset//share",
        "",
    ],
)
def test_unknown_keys_are_not_found(key: str) -> None:
    assert catalog.lookup(key) is None


def test_builders_give_known_keys_and_refuse_unknown_pairs() -> None:
    assert keys_stage2.loss_atom("A2_coord", "bbox_ciou") == "loss/A2_coord/bbox_ciou"
    assert keys_stage2.coord_diagnostic("B", "p_gt_mean") == "coord_diag/B/p_gt_mean"
    assert keys_stage2.strict_drop_reason("malformed").endswith("/strict_drop/reason/malformed")
    assert keys_stage1.COORD_SOFTCE_W1_ALIASES["coord_diag/w1"] == "coord_softce_w1/w1"
    with pytest.raises(KeyError):
        keys_stage2.loss_atom("A1_text", "bbox_ciou")


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("coord_diag/los", "did you mean coord_diag/loss?"),
        ("eval_rollout/presicion", "did you mean eval_rollout/precision?"),
        ("obj/B_coord/bbox_ciou", "replaced by loss/B_coord/bbox_ciou"),
        ("loss/token_ce_obj", "replaced by loss/<provenance>/struct_ce and loss/<provenance>/desc_ce"),
        ("loss/coord_tail", "replaced by the coordinate atoms under loss/A2_coord/ and loss/B_coord/"),
        ("eval_rollout/segm_AP", "replaced by rollout/mAP"),
    ],
)
def test_strict_names_the_key_and_what_to_use(key: str, expected: str) -> None:
    with pytest.raises(ContractError, match=re.escape(repr(key))) as caught:
        catalog.resolve(key, strict=True)
    assert expected in str(caught.value)


def test_production_warns_once_and_guesses_the_reduction(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        guesses = {
            key: catalog.resolve(key, strict=False).reduce.value
            for key in (
                "new/things_total",
                "new/hit_rate",
                "time/new_s",
                "new/len_p99",
                "new/level",
                "new/level",
            )
        }
    assert guesses == {
        "new/things_total": "sum",
        "new/hit_rate": "mean",
        "time/new_s": "max",
        "new/len_p99": "max",
        "new/level": "mean",
    }
    assert sum("'new/level'" in record.getMessage() for record in caplog.records) == 1


def test_strictness_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(catalog.STRICT_ENV, "1")
    with pytest.raises(ContractError):
        catalog.check_known(["loss", "rollout/_helper", "no/such_key"])
    monkeypatch.setenv(catalog.STRICT_ENV, "0")
    catalog.check_known(["no/such_key"])


def test_catalogue_and_payload_need_no_torch() -> None:
    program = (
        "import sys; sys.modules['torch'] = None\n"
        "import coordexp.metrics.catalog as c, coordexp.metrics.payload as p\n"
        "assert c.lookup('loss').in_loss\n"
        "assert p.build_payload('train', 1, {'loss': 2.0})['metrics'] == {'loss': 2.0}\n"
    )
    root = str(Path(coordexp.__file__).parents[1])
    subprocess.run([sys.executable, "-c", program], check=True, env={**os.environ, "PYTHONPATH": root})


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_keys_are_spelled_in_the_catalogue_only(path: Path) -> None:
    """Everywhere else a key is its constant (a key without a slash may be the name of something else)."""
    keys = {spec.key for spec in catalog.all_specs() if "/" in spec.key}
    keys |= {catalog.EVAL_PREFIX + key for key in keys}
    constants = (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant))
    assert not {node.value for node in constants if isinstance(node.value, str)} & keys

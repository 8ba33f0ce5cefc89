"""What ranks must have in common: settings, code, files, and an output folder that fits."""

from __future__ import annotations

from dataclasses import replace

import pytest

from coordexp.trainers.start.meeting.compare import disagreements
from coordexp.trainers.start.meeting.facts import FoundAt, OutputFolder, StartFacts, place_of

SHARED = OutputFolder("/out", saves=True, on_each_node=False)
EACH = OutputFolder("/out", saves=True, on_each_node=True)


def rank(number: int, node: int, **changes: object) -> StartFacts:
    facts = StartFacts(
        number, f"host{node}", str(node), {"learning_rate": "0.001"}, {"torch": "2.13.0"},
        {"model": FoundAt("/model", {"config.json": "a"})}, "/out", True,
    )  # fmt: skip
    return replace(facts, **changes)


def four(**of_last: object) -> list[StartFacts]:
    """Two nodes of two ranks; something is different for both ranks of the second."""
    return [rank(0, 0), rank(1, 0), rank(2, 1, **of_last), rank(3, 1, **of_last)]


def test_equal_ranks_agree():
    assert disagreements(four(), SHARED) == []


@pytest.mark.parametrize(
    ("of_last", "said"),
    [
        (
            {"settings": {"learning_rate": "0.01"}},
            "learning_rate: 0.01 for rank 2 on host1 (node 1), 0.001 for rank 0 on host0 (node 0) (and 1 "
            "more rank). Start",
        ),
        ({"settings": {}}, "learning_rate: not set for rank 2 on host1"),
        ({"settings": {"learning_rate": "0.001", "bf16": "true"}}, "bf16: true for rank 2 on host1 (node 1), not set"),
        ({"versions": {"torch": "2.12.0"}}, "torch: 2.12.0 for rank 2 on host1 (node 1), 2.13.0 for rank 0"),
        ({"versions": {}}, "torch: not installed for rank 2"),
        (
            {"places": {"model": FoundAt("/local/model", None)}},
            "model: rank 2 on host1 (node 1) finds nothing at /local/model; rank 0 on host0 (node 0) has /model "
            "(and 1 more",
        ),
        (
            {"places": {"model": FoundAt("/local/model", {"config.json": "b"})}},
            "model: /local/model of rank 2 on host1 (node 1) is not what rank 0 on host0 (node 0) has at /model "
            "(config.json: b and a)",
        ),
        (
            {"places": {"model": FoundAt("/model", {"config.json": "a", "model.safetensors": "c"})}},
            "(model.safetensors: c and missing)",
        ),
        (
            {"output_dir": "/local/out", "sees_output": False},
            "output_dir: /local/out of rank 2 on host1 (node 1) is not the folder /out of rank 0 on host0 "
            "(node 0) (and 1",
        ),
    ],
)  # fmt: skip
def test_a_difference_is_told_once_with_rank_host_and_value(of_last, said):
    (sentence,) = disagreements(four(**of_last), SHARED)
    assert said in sentence


def test_the_rank_that_lacks_a_file_may_be_the_first():
    ranks = four()
    ranks[0] = replace(ranks[0], places={"model": FoundAt("/gone", None)})
    (sentence,) = disagreements(ranks, SHARED)
    assert "rank 0 on host0 (node 0) finds nothing at /gone; rank 1 on host0 (node 0) has /model" in sentence


def test_a_name_of_a_hub_is_no_missing_path():
    places = {"model": FoundAt("owner/name", None)}
    assert disagreements([rank(0, 0, places=places), rank(1, 1, places=places)], SHARED) == []


def test_the_same_files_may_lie_elsewhere():
    places = {"model": FoundAt("/local/model", {"config.json": "a"})}
    assert disagreements(four(places=places), SHARED) == []


def test_folders_of_their_own_need_a_checkpoint_on_each_node():
    apart = {"output_dir": "/local/out", "sees_output": False}
    assert disagreements(four(**apart), EACH) == []
    assert disagreements(four(**apart), replace(SHARED, saves=False)) == []
    (sentence,) = disagreements(four(**apart), SHARED)
    assert sentence.endswith("or set save_on_each_node: true.")


def test_a_checkpoint_on_each_node_needs_folders_of_their_own():
    (sentence,) = disagreements(four(), EACH)
    assert sentence.startswith(
        "save_on_each_node: rank 2 on host1 (node 1) writes into the same folder /out as rank 0"
    )
    assert disagreements([rank(0, 0), rank(1, 0)], EACH) == []  # one node


def test_a_place_is_what_lies_there(tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    for name in ("trainer_state.json", "training_args.bin", "optimizer.pt", "rng_state_1.pth"):
        (model / name).write_text("of one rank")
    (model / "model.safetensors").write_bytes(b"\0" * (5 << 20))
    found = place_of(str(model))
    assert found.path == str(model)
    assert set(found.parts) == {"config.json", "model.safetensors"}
    assert found.parts["model.safetensors"].startswith("5242880 bytes")
    (model / "model.safetensors").write_bytes(b"\0" * ((5 << 20) - 1) + b"\1")
    changed = place_of(str(model))
    assert changed.parts["config.json"] == found.parts["config.json"]
    assert changed.parts["model.safetensors"] != found.parts["model.safetensors"]
    assert place_of(str(tmp_path / "gone")).parts is None
    assert place_of("owner/name").path.endswith("owner/name")


def test_facts_travel():
    facts = rank(
        3, 1, places={"data file": FoundAt("/a.jsonl", {"a.jsonl": "x"}), "model": FoundAt("m", None)}
    )
    assert StartFacts.from_json(facts.to_json()) == facts

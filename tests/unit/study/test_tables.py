"""Tables of a study: what stands in the cells, and which one is marked."""

from __future__ import annotations

from typing import Any

from coordexp.study.page import curve_band
from coordexp.study.statistics import COMPARED
from coordexp.study.tables import markdown, shown_tables


def spread(*values: float) -> dict[str, Any]:
    sd = None if len(values) == 1 else 0.1
    return {"mean": sum(values) / len(values), "low": min(values), "high": max(values), "sd": sd}


def gain(mean: float, low: float, high: float, *by_seed: float) -> dict[str, Any]:
    return {"mean": mean, "low": low, "high": high, "by_seed": list(by_seed)}


def row(name: str, seeds: list[int], numbers: dict[str, Any], difference: Any = ()) -> dict[str, Any]:
    cost = {"steps": spread(600), "train_s": spread(180.4, 219.6)}
    return {
        "recipe": name, "label": name.upper(), "seeds": seeds, "readouts": {"argmax/logprob": numbers},
        "readout": "argmax/logprob", "cost": cost, "cost_is_whole": name != "mix", "difference": difference,
    }  # fmt: skip


RESULTS: dict[str, Any] = {
    "command": "coordexp study a.yaml",
    "seeds": [1, 2],
    "baseline": ["ce", "absent"],
    "headline": ["AP"],
    "readout": "argmax/logprob",
    "tables": [
        {
            "data": "few",
            "label": "500 scenes",
            "rows": [
                row("ce", [1, 2], {"AP": spread(0.04, 0.06), "bin_error": spread(20.0, 22.0)}),
                row(
                    "mix",
                    [1],
                    {"AP": spread(0.2), "bin_error": spread(9.0)},
                    {"ce": dict.fromkeys(COMPARED, gain(0.15, 0.1, 0.2, 0.14, 0.16))},
                ),
            ],
        }
    ],
}


def test_a_row_that_is_read_otherwise_says_so():
    read = {**RESULTS, "readout": "median/expected_iou"}
    assert [name for name, _ in shown_tables(read)[0].rows] == [
        "CE, argmax/logprob", "MIX (1 of 2 seeds), argmax/logprob",
    ]  # fmt: skip


def test_numbers_with_spread_and_the_best_of_a_column():
    numbers, differences, cost = shown_tables(RESULTS)
    assert [name for name, _ in numbers.rows] == ["CE", "MIX (1 of 2 seeds)"]
    column = {head: [cells[i] for _, cells in numbers.rows] for i, head in enumerate(numbers.heads)}
    assert [tuple(cell) for cell in column["mAP"]] == [(".050", ".040 to .060", False), (".200", "", True)]
    assert [tuple(cell) for cell in column["bin error"]] == [
        ("21.0", "20.0 to 22.0", False), ("9.0", "", True),
    ]  # fmt: skip
    assert [cell.text for cell in column["AP75"]] == ["–", "–"]
    assert differences.title == "500 scenes: difference to CE"
    assert differences.rows == [("MIX", [("+0.150 [+0.100, +0.200]", "+0.140, +0.160", False)] * 4)]
    assert [name for name, _ in cost.rows] == ["CE", "MIX *"]
    assert cost.rows[0][1][:2] == [("600", "", False), ("200", "180 to 220", False)]


def test_markdown_is_a_table_per_question_with_its_command():
    text = markdown(RESULTS)
    assert text.startswith("`coordexp study a.yaml`, seeds 1, 2.\n")
    assert "| CE | .050 (.040 to .060) |" in text
    assert "| MIX (1 of 2 seeds) | **.200** |" in text
    tables = [block for block in text.split("\n\n") if block.startswith("|")]
    assert len(tables) == 3
    for table in tables:
        assert len({line.count("|") for line in table.splitlines()}) == 1


def test_bands_are_of_the_steps_that_all_seeds_have():
    band = curve_band([([1, 5, 10], [4.0, 2.0, 1.0]), ([5, 10, 15], [4.0, 3.0, 1.0])])
    assert band == ([5, 10], [3.0, 2.0], [2.0, 1.0], [4.0, 3.0])
    assert curve_band([([], []), ([1], [1.0])]).steps == []
    assert curve_band([]).steps == []

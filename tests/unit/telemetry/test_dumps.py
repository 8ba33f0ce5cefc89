"""Monitor dumps: what they hold, that they are whole, bounded, late rather than blocking, and never raise."""

from __future__ import annotations

import json
import logging
import threading
import time
from html.parser import HTMLParser

import pytest
from PIL import Image

from coordexp.config.schema.rollout import MonitorDump
from coordexp.telemetry.dumps import QUEUE_SIZE, DumpSample, MonitorDumps

TOKENS = [("ask: ", "prompt"), ('{"desc": "', "matched prefix"), ("cat", "matched prefix"), ("]}", "closure")]


def settings(**options):
    return MonitorDump(**{"enabled": True, "every_steps": 2, "min_free_gb": 0.0, **options})


def sample(sample_id="val.jsonl:1", **values):
    return DumpSample(
        **{
            "sample_id": sample_id,
            "prompt": "ask: ",
            "rollout": 'a ``` b | c\n<b>"cat"</b>',
            "target": '{"desc": "cat"]}',
            "target_tokens": TOKENS,
            "gts": [("cat", (1, 2, 3, 4)), ("dog | x", (5, 6, 7, 8))],
            "preds": [("cat", (1, 2, 3, 5)), ("bird", (9, 9, 10, 10))],
            "matched": [(0, 0)],
            "facts": {"generated tokens": 12, "flags": ["truncated"]},
            **values,
        }
    )


def draw():
    return Image.new("RGB", (8, 6), "#009E73")


def warnings_of(caplog):
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


class Spans(HTMLParser):
    """(class, text) of each token."""

    def __init__(self, html):
        super().__init__()
        self.found, self._css = [], None
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self._css = attributes["class"] if "title" in attributes else None

    def handle_data(self, text):
        if self._css is not None:
            self.found.append((self._css, text))
            self._css = None


def test_what_a_dump_holds(tmp_path):
    dumps = MonitorDumps(settings(max_samples=2), tmp_path / "dumps")
    dumps.submit(2, [sample(draw=draw), sample("val.jsonl:2"), sample("val.jsonl:3")])
    dumps.close()
    folder = tmp_path / "dumps" / "step_000002"
    assert sorted(path.name for path in folder.iterdir()) == [
        "sample_00.html",
        "sample_00.json",
        "sample_00.md",
        "sample_00.png",
        "sample_01.html",
        "sample_01.json",
        "sample_01.md",
    ]
    record = json.loads((folder / "sample_00.json").read_text())
    assert record == {
        "step": 2,
        "sample_id": "val.jsonl:1",
        "facts": {"generated tokens": 12, "flags": ["truncated"]},
        "prompt": "ask: ",
        "rollout": 'a ``` b | c\n<b>"cat"</b>',
        "target": '{"desc": "cat"]}',
        "target_runs": [
            {"role": "prompt", "text": "ask: "},
            {"role": "matched prefix", "text": '{"desc": "cat'},
            {"role": "closure", "text": "]}"},
        ],
        "gt": [
            {"desc": "cat", "bins": [1, 2, 3, 4], "pred": 0},
            {"desc": "dog | x", "bins": [5, 6, 7, 8], "pred": None},
        ],
        "pred": [
            {"desc": "cat", "bins": [1, 2, 3, 5], "gt": 0},
            {"desc": "bird", "bins": [9, 9, 10, 10], "gt": None},
        ],
    }
    with Image.open(folder / "sample_00.png") as picture:
        assert picture.size == (8, 6)
    spans = Spans((folder / "sample_00.html").read_text())
    assert spans.found == [
        ("t prompt struct", "ask: "),
        ("t matched-prefix struct", '{"desc": "'),
        ("t matched-prefix struct", "cat"),
        ("t closure struct", "]}"),
    ]


def test_the_markdown_page_keeps_text_as_it_is(tmp_path):
    dumps = MonitorDumps(settings(), tmp_path)
    dumps.submit(0, [sample(draw=draw)])
    dumps.close()
    page = (tmp_path / "step_000000" / "sample_00.md").read_text()
    assert '````\na ``` b | c\n<b>"cat"</b>\n````' in page  # a fence longer than the backticks inside
    assert "![ground truth and prediction](sample_00.png)" in page
    assert "| pred 1 | `` bird `` | 9 9 10 10 | false positive |" in page
    assert "| gt 1 | `` dog \\| x `` | 5 6 7 8 | missed |" in page
    assert "| gt 0 | `` cat `` | 1 2 3 4 | found by pred 0 |" in page


def test_long_texts_are_cut_everywhere(tmp_path):
    dumps = MonitorDumps(settings(max_text_chars=10), tmp_path)
    tokens = [("abcd", "prompt")] * 4
    dumps.submit(0, [sample(rollout="x" * 25, target="y" * 10, target_tokens=tokens)])
    dumps.close()
    record = json.loads((tmp_path / "step_000000" / "sample_00.json").read_text())
    assert record["rollout"] == "x" * 10 + " ... (15 more characters)"
    assert record["target"] == "y" * 10
    assert record["target_runs"] == [
        {"role": "prompt", "text": "abcdabcd"},
        {"role": "cut", "text": " ... (2 more tokens)"},
    ]
    assert "abcd" * 3 not in (tmp_path / "step_000000" / "sample_00.html").read_text().replace("</span>", "")


def test_only_due_steps_up_to_the_limit_also_after_a_restart(tmp_path):
    dumps = MonitorDumps(settings(max_events=2), tmp_path)
    asked = [step for step in range(9) if dumps.wants(step) and not dumps.submit(step, [sample()])]
    dumps.close()
    assert asked == [0, 2]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_000000", "step_000002"]
    assert not MonitorDumps(settings(max_events=2), tmp_path).wants(4)
    assert MonitorDumps(settings(max_events=3), tmp_path).wants(4)
    assert not MonitorDumps(settings(enabled=False), tmp_path).wants(0)


def test_a_step_done_again_replaces_its_dump(tmp_path):
    for name in ("first", "second"):
        dumps = MonitorDumps(settings(), tmp_path)
        dumps.submit(2, [sample(name)] if name == "second" else [sample(name), sample(name)])
        dumps.close()
    assert [path.name for path in tmp_path.iterdir()] == ["step_000002"]
    assert json.loads((tmp_path / "step_000002" / "sample_00.json").read_text())["sample_id"] == "second"


def test_a_slow_disk_costs_dumps_not_time(tmp_path, caplog):
    gate = threading.Event()

    def slow():
        gate.wait(20)
        return draw()

    dumps = MonitorDumps(settings(every_steps=1, max_events=100), tmp_path)
    dumps.submit(0, [sample(draw=slow)])
    while dumps._queue.qsize():  # the thread has taken the first and waits in it
        time.sleep(0.01)
    started = time.monotonic()
    for step in range(1, 4 + QUEUE_SIZE):
        dumps.submit(step, [sample()])
    assert time.monotonic() - started < 1.0
    assert dumps.num_left_out == 3
    assert list(tmp_path.glob("step_*")) == []  # nothing is seen before it is whole
    gate.set()
    dumps.close()
    assert len(list(tmp_path.iterdir())) == 1 + QUEUE_SIZE
    assert warnings_of(caplog) == [
        "monitor dumps: 3 left out, as writing one takes longer than the steps between."
    ]


def test_close_does_not_wait_for_ever(tmp_path, caplog):
    gate = threading.Event()
    dumps = MonitorDumps(settings(), tmp_path)
    dumps.submit(0, [sample(draw=lambda: gate.wait(20) and draw())])
    started = time.monotonic()
    dumps.close(timeout_s=0.2)
    assert time.monotonic() - started < 2.0
    assert warnings_of(caplog) == ["monitor dumps: not all were written within 0.2 s; the rest is lost."]
    gate.set()
    dumps._thread.join(10)


@pytest.mark.parametrize("case", ["a file in the way", "a picture that fails"])
def test_what_goes_wrong_is_said_once_and_ends_the_dumps(tmp_path, caplog, case):
    out_dir = tmp_path / "dumps"
    if case == "a file in the way":
        out_dir.write_text("not a folder")
    fails = sample(draw=lambda: Image.open(tmp_path / "none.png"))
    dumps = MonitorDumps(settings(every_steps=1), out_dir)
    for step in range(5):
        dumps.submit(step, [fails])
        time.sleep(0.05)
    assert not dumps.wants(6)
    dumps.close()
    assert len(warnings_of(caplog)) == 1
    assert "step 0 failed, no more are written" in caplog.text
    assert [path for path in tmp_path.rglob("*") if path.name != "dumps"] == []  # no half of a dump is left


def test_a_full_disk_skips_dumps_with_one_warning(tmp_path, caplog):
    dumps = MonitorDumps(settings(every_steps=1, min_free_gb=1e9, max_events=1), tmp_path)
    for step in range(3):
        dumps.submit(step, [sample()])
        while dumps._num_skipped <= step:
            time.sleep(0.01)
    assert dumps.wants(3)  # skipped ones do not use up max_events
    dumps.close()
    assert list(tmp_path.iterdir()) == []
    (warning,) = warnings_of(caplog)
    assert "less than min_free_gb = 1e+09" in warning


def test_closing_without_dumps_and_twice(tmp_path):
    dumps = MonitorDumps(settings(), tmp_path)
    dumps.close()
    dumps.submit(2, [sample()])
    dumps.close()
    assert list(tmp_path.iterdir()) == []


def test_null_dumps_as_often_as_the_run_logs(tmp_path):
    dumps = MonitorDumps(settings(every_steps=None), tmp_path, logging_steps=5)
    assert [step for step in range(11) if dumps.wants(step)] == [0, 5, 10]


def test_no_event_is_no_dump(tmp_path):
    dumps = MonitorDumps(settings(max_events=0), tmp_path)
    assert not any(dumps.wants(step) for step in range(10))


def test_text_is_cut_after_so_many_characters_or_never(tmp_path):
    long = sample(rollout="x" * 9000, target_tokens=[("y" * 50, "prompt")] * 100)
    for limit, length in ((10, len("x" * 10 + " ... (8990 more characters)")), (0, 9000)):
        dumps = MonitorDumps(settings(max_text_chars=limit), tmp_path / str(limit))
        dumps.submit(2, [long])
        dumps.close()
        record = json.loads((tmp_path / str(limit) / "step_000002" / "sample_00.json").read_text())
        assert len(record["rollout"]) == length
        html = (tmp_path / str(limit) / "step_000002" / "sample_00.html").read_text()
        assert html.count("y" * 50) == (100 if limit == 0 else 0)

"""What the inspector prints and writes for a record, for a rollout of it, and for bad input."""

from __future__ import annotations

import importlib.util
import io
import json
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.console import Console

from coordexp.config import Prompt
from coordexp.config.prompt import write_prompt
from coordexp.models.tiny_tokenizer import train_tiny_tokenizer

TOOL = Path(__file__).parents[3] / "tools" / "inspect_sample.py"
RECORD = {
    "images": ["a.png"],
    "width": 640,
    "height": 480,
    "objects": [
        {"desc": "cat", "bbox_2d": [500, 501, 900, 901]},
        {"desc": "red <b>box</b>", "bbox_2d": [10, 20, 300, 400]},
    ],
}
ROLLOUT = (
    '{"objects": [{"desc": "red box", "bbox_2d": [<|coord_12|>, <|coord_22|>, <|coord_310|>, <|coord_402|>]}, '
    '{"desc": "dog", "bbox_2d": [<|coord_700|>, <|coord_0|>, <|coord_800|>, <|coord_90|>]}, {"desc": "x"}]}'
)


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("inspect_sample", TOOL)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_text("\n".join([json.dumps(RECORD), "", '{"images": [', ""]), encoding="utf-8")
    return path


class Page(HTMLParser):
    """The tokens of a page: (text, note, classes, tooltip)."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tokens: list[list] = []
        self.links: list[str] = []
        self._inside = self._in_note = False
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.links += [value for name, value in attrs if name in ("src", "href")]
        if tag == "span" and "title" in attributes:
            self.tokens.append(["", "", attributes["class"].split(), attributes["title"].split(" · ")])
            self._inside = True
        self._in_note = tag == "sub"

    def handle_endtag(self, tag):
        if tag == "sub":
            self._in_note = False
        elif tag == "span":
            self._inside = False

    def handle_data(self, text):
        if self._inside:
            self.tokens[-1][1 if self._in_note else 0] += text


def run(tool, data, *flags):
    """Exit code, what was printed (180 columns, no colours) and the page."""
    printed, html = io.StringIO(), data.parent / "page.html"
    code = tool.main(
        [f"{data}:1", "--html", str(html), *flags], Console(file=printed, width=180, highlight=False)
    )
    return code, printed.getvalue(), html.read_text(encoding="utf-8") if html.exists() else None


def test_a_record_is_shown_as_ground_truth(tool, data):
    code, printed, html = run(tool, data)
    assert code == 0
    page = Page(html)
    text = "".join(token[0] for token in page.tokens)
    answer = (
        '{"objects": [{"desc": "red <b>box</b>", "bbox_2d": [<|coord_10|>, <|coord_20|>, <|coord_300|>, '
        '<|coord_400|>]}, {"desc": "cat", "bbox_2d": [<|coord_500|>, <|coord_501|>, <|coord_900|>, '
        "<|coord_901|>]}]}<|im_end|>"
    )
    assert text.endswith("<|im_start|>assistant\n" + answer)
    assert "Detect all objects in the image." in text
    assert page.links == []
    assert "http" not in html
    ids = train_tiny_tokenizer().encode(text, add_special_tokens=False)
    assert [token[3][1] for token in page.tokens] == [f"id {token_id}" for token_id in ids]
    notes = [token[1] for token in page.tokens if token[1]]
    assert notes == ["10", "20", "300", "400", "500", "501", "900", "901"]
    assert page.tokens[-1][2] == ["t", "eos", "eos"]
    assert page.tokens[-1][3][2:] == ["eos", "eos", "weight 1"]
    assert page.tokens[0][2] == ["t", "prompt", "ignore", "off"]
    assert "ground truth: 2 objects" in printed
    assert "<|coord_10|>->10" in printed
    assert printed.index("10 20 300 400") < printed.index("500 501 900 901")


def test_a_rollout_is_shown_with_its_roles_and_weights(tool, data):
    code, printed, html = run(
        tool,
        data,
        "--rollout",
        ROLLOUT,
        "--fn-desc-weight=0.25",
        "--matched-struct-weight=0.5",
        "--drop-invalid-multiplier=2",
    )
    assert code == 0
    assert "rollout: 2 objects kept; dropped: 1 missing_geom" in printed
    assert "matched 1 of 2: 'red box' is object 0 (IoU 0.95)" in printed
    by_role = {}
    for text, note, classes, tooltip in Page(html).tokens:
        by_role.setdefault(tooltip[2], []).append((text, tooltip[4], note, "off" in classes))
    assert ("desc", "weight 0.5", "0.5", False) in by_role["matched prefix"]
    assert ("red", "weight 0", "", True) in by_role["matched prefix"]
    assert ("<|coord_12|>", "weight 0", "10", False) in by_role["matched prefix"]
    assert {off for _, _, _, off in by_role["fp prefix"]} == {True}
    assert {off for _, _, _, off in by_role["dropped prefix"]} == {True}
    assert ("desc", "weight 2", "2", False) in by_role["fn tail"]
    assert ("<|coord_901|>", "weight 0", "901", False) in by_role["fn tail"]
    assert {weight for _, weight, _, _ in by_role["closure"]} == {"weight 1"}
    written_and_taught = [line.split() for line in printed.splitlines() if "12 22 310 402" in line]
    assert "10 20 300 400" in " ".join(written_and_taught[-1])


def test_an_answer_without_a_container_says_so(tool, data):
    code, printed, _ = run(tool, data, "--rollout", "I see a cat")
    assert code == 0
    assert "rollout is invalid_rollout" in printed
    assert "the prefix is the empty container: all 2 are missed" in printed


def test_a_rollout_can_come_from_standard_input(tool, data, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO(ROLLOUT))
    _, printed, _ = run(tool, data, "--rollout", "-")
    assert "matched 1 of 2" in printed


def test_another_tokenizer_and_field_order(tool, data, tmp_path):
    folder = tmp_path / "model"
    train_tiny_tokenizer(corpus=["a"], bpe_vocab_size=256).save_pretrained(folder)
    code, _, html = run(tool, data, "--model", str(folder), "--field-order", "geometry_first")
    tokens = Page(html).tokens
    assert code == 0
    assert '{"bbox_2d": [<|coord_10|>' in "".join(token[0] for token in tokens)
    assert "objects" not in [token[0] for token in tokens]  # one token per byte


def test_a_checkpoint_is_asked_as_it_was_trained(tool, data, tmp_path):
    folder = tmp_path / "model"
    train_tiny_tokenizer().save_pretrained(folder)
    trained = Prompt(
        user="Find all.", system="You detect.", media_order="text_first", object_field_order="geometry_first"
    )
    write_prompt(folder, trained)
    code, printed, html = run(tool, data, "--model", str(folder))
    assert code == 0
    text = "".join(token[0] for token in Page(html).tokens)
    assert text.startswith(
        "<|im_start|>system\nYou detect.<|im_end|>\n<|im_start|>user\nFind all.<|vision_start|><|image_pad|>"
        '<|vision_end|><|im_end|>\n<|im_start|>assistant\n{"objects": [{"bbox_2d": [<|coord_10|>'
    )
    assert f"prompt: as trained ({folder}/coordexp_prompt.json)" in printed
    assert ", but" not in printed

    code, printed, html = run(
        tool,
        data,
        "--model",
        str(folder),
        "--prompt",
        "Find cats.",
        "--system",
        "",
        "--field-order",
        "desc_first",
    )
    text = "".join(token[0] for token in Page(html).tokens)
    assert (code, text.startswith("<|im_start|>user\nFind cats.<|vision_start|>")) == (0, True)
    assert '{"objects": [{"desc": "red' in text
    for line in (
        '--prompt is "Find cats.", trained with "Find all."',
        '--system is null, trained with "You detect."',
        '--field-order is "desc_first", trained with "geometry_first"',
    ):
        assert line in printed


def test_a_record_of_a_prompt_that_cannot_be_read_is_named(tool, data, tmp_path, capsys):
    folder = tmp_path / "model"
    train_tiny_tokenizer().save_pretrained(folder)
    (folder / "coordexp_prompt.json").write_text('{"version": 9}')
    assert tool.main([f"{data}:1", "--model", str(folder)]) == 2
    assert "coordexp_prompt.json: version 9" in capsys.readouterr().err


def test_descriptions_are_shown_as_text_whatever_their_tokens(tool, data, real_model):
    desc = "🧑\u200d🚀 猫と犬 e\u0301"
    record = RECORD | {"objects": [{"desc": desc, "bbox_2d": [1, 2, 30, 40]}]}
    data.write_text(json.dumps(record), encoding="utf-8")
    code, printed, html = run(tool, data, "--model", str(real_model))
    assert code == 0
    tokens = Page(html).tokens
    assert "🧑\u200d🚀 猫と犬 \u00e9" in "".join(token[0] for token in tokens)
    assert all("\\x" not in shown for shown in (printed, html))
    parts = [token for token in tokens if token[3][-1] == "part of a character"]
    assert len(parts) == 2
    assert {token[0] for token in parts} == {""}


BAD_INPUT = {
    "no line": ("{file}", "expected FILE.jsonl:LINE with a line number from 1"),
    "a word for a line": ("{file}:one", "expected FILE.jsonl:LINE with a line number from 1"),
    "line 0": ("{file}:0", "expected FILE.jsonl:LINE with a line number from 1"),
    "a blank line": ("{file}:2", "train.jsonl:2 is blank"),
    "a line that is no record": ("{file}:3", "train.jsonl:3: is not one line of JSON"),
    "a line behind the end": ("{file}:4", "train.jsonl has 3 lines, there is no line 4"),
    "no such file": ("{file}x:1", "train.jsonlx: cannot be read"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_exits_with_2_and_names_the_place(tool, data, capsys, case):
    place, message = BAD_INPUT[case]
    assert tool.main([place.format(file=data)]) == 2
    assert message in capsys.readouterr().err


def test_a_folder_without_a_tokenizer_and_a_weight_out_of_range_are_refused(tool, data, tmp_path, capsys):
    assert tool.main([f"{data}:1", "--model", str(tmp_path)]) == 2
    assert "no tokenizer_config.json there" in capsys.readouterr().err
    assert tool.main([f"{data}:1", "--drop-invalid-multiplier", "9"]) == 2
    assert "rollout_drop_invalid_struct_ce_multiplier = 9.0" in capsys.readouterr().err

"""The token trace names every token of an answer, those that the tokenizer does not know included."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from coordexp.codec.forms.choose import form_of
from coordexp.codec.records import read_jsonl
from coordexp.eval.predictions.artifacts import GT_VS_PRED, TOKEN_TRACE
from coordexp.eval.predictions.log import PredictionLog
from coordexp.eval.predictions.predict import predict
from coordexp.rollout.backend import RolloutBackend
from coordexp.rollout.time_limit import TimeLimit
from coordexp.rollout.types import Rollout, RolloutRequest


class Fixed(RolloutBackend):
    """Answers these ids to everything."""

    name = "fixed"
    max_new_tokens = 8

    def __init__(self, ids: Sequence[int]) -> None:
        super().__init__()
        self.ids = tuple(ids)

    def _release(self) -> None:
        pass

    def _answers(
        self, requests: Sequence[RolloutRequest], max_new_tokens: int, time_limit: TimeLimit | None
    ) -> list[Rollout]:
        answer = Rollout((1, 2), self.ids, (-0.5,) * len(self.ids), finish_reason="length", seconds=0.1)
        return [answer] * len(requests)


def answered(folder: Path, tok: Any, ids: Sequence[int], *, size: tuple[int, int], **options: Any):
    """The line of predictions and the trace of one picture that is answered so."""
    Image.new("RGB", size).save(folder / "a.png")
    line = {"images": ["a.png"], "width": size[0], "height": size[1], "objects": []}
    (folder / "data.jsonl").write_text(json.dumps(line) + "\n")
    records = read_jsonl(folder / "data.jsonl", require_images=True)
    requests = [RolloutRequest(({"role": "user", "content": "?"},), (), request_id="a.png")]
    output = folder / "out"
    with PredictionLog.open(output, {}, num_images=1, chunk_size=1, overwrite=True, notes={}) as log:
        predict(records, requests, Fixed(ids), tok, log, **options)
    return [json.loads((output / name).read_text()) for name in (GT_VS_PRED, TOKEN_TRACE)]


@pytest.mark.parametrize(
    ("form", "text"),
    [
        ("coordjson", '{"objects": [{"desc": "cat", "bbox_2d": '
         "[<|coord_12|>, <|coord_40|>, <|coord_310|>, <|coord_402|>]}, {\"desc\": \"cat\", \"bbox_2d\": "
         "[<|coord_0|>, <|coord_499|>, <|coord_500|>, <|coord_999|>]}]}"),
        ("coordjson_numbers", '{"objects": [{"desc": "cat", "bbox_2d": [12, 40, 310, 402]}, '
         '{"desc": "cat", "bbox_2d": [0, 499, 500, 999]}]}'),
        ("qwen", '[{"bbox_2d": [12, 40, 310, 402], "label": "cat"}, {"bbox_2d": [0, 499, 501, 1000], "label": "cat"}]'),
        ("qwen", '```json\n[\n\t{"bbox_2d": [12, 40, 310, 402], "label": "cat"},\n'
         '\t{"bbox_2d": [0, 499, 500, 1000], "label": "cat"}\n]\n```'),
        ("compact", "[\ncat<|coord_12|><|coord_40|><|coord_310|><|coord_402|>"
         "<|coord_0|><|coord_499|><|coord_500|><|coord_999|>]"),
    ],
)  # fmt: skip
def test_pixels_of_every_form_worked_by_hand(real_tok, tmp_path: Path, form: str, text: str):
    """A picture of 1000 x 500: bin k lies at column k and at row k * 499 / 999 = 0.499499... k."""
    ids = real_tok.encode(text + "<|im_end|>", add_special_tokens=False)
    line, trace = answered(tmp_path, real_tok, ids, size=(1000, 500), form=form_of(form))
    assert [obj["points"] for obj in line["pred"]] == [
        pytest.approx([12, 19.97998, 310, 200.79880], abs=1e-5),
        pytest.approx([0, 249.25025, 500, 499], abs=1e-5),
    ]
    assert [obj["desc"] for obj in line["pred"]] == ["cat", "cat"]
    assert (line["errors"], len(trace["object_token_positions"])) == ({}, 2)
    names = trace["generated_token_text"]
    assert [[names[p] for p in found] for found in trace["object_desc_token_positions"]] == [["cat"], ["cat"]]


def test_an_id_beyond_the_tokenizer_has_a_name_in_the_trace(real_tok, tmp_path: Path):
    """The head of a model has more rows than its tokenizer has tokens: an untrained one writes them."""
    unknown = len(real_tok) + 7
    ids = [*real_tok.encode('{"', add_special_tokens=False), unknown, 151645]
    _, trace = answered(tmp_path, real_tok, ids, size=(32, 32))
    assert trace["generated_token_text"] == ['{"', f"<id {unknown}>", "<|im_end|>"]
    assert trace["text"] == '{"'

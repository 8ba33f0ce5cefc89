"""The token trace names every token of an answer, those that the tokenizer does not know included."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from coordexp.codec.records import read_jsonl
from coordexp.eval.predictions.artifacts import TOKEN_TRACE
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


def test_an_id_beyond_the_tokenizer_has_a_name_in_the_trace(real_tok, tmp_path: Path):
    """The head of a model has more rows than its tokenizer has tokens: an untrained one writes them."""
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    line = {"images": ["a.png"], "width": 32, "height": 32, "objects": []}
    (tmp_path / "data.jsonl").write_text(json.dumps(line) + "\n")
    records = read_jsonl(tmp_path / "data.jsonl", require_images=True)
    unknown = len(real_tok) + 7
    ids = [*real_tok.encode('{"', add_special_tokens=False), unknown, 151645]
    requests = [RolloutRequest(({"role": "user", "content": "?"},), (), request_id="a.png")]
    with PredictionLog.open(
        tmp_path / "out", {}, num_images=1, chunk_size=1, overwrite=True, notes={}
    ) as log:
        predict(records, requests, Fixed(ids), real_tok, log)
    [trace] = map(json.loads, (tmp_path / "out" / TOKEN_TRACE).read_text().splitlines())
    assert trace["generated_token_text"] == ['{"', f"<id {unknown}>", "<|im_end|>"]
    assert trace["text"] == '{"'

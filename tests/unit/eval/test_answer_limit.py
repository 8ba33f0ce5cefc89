"""How long answers may become, from the ground truth of the file."""

from __future__ import annotations

import json
import time

import pytest
from PIL import Image

from coordexp.cli.main import main
from coordexp.codec.records import Record
from coordexp.codec.schema import BoxObject
from coordexp.codec.serialize import serialize
from coordexp.eval.predictions.answer_limit import answer_limit
from coordexp.eval.predictions.log import PredictionLog
from coordexp.inference.checked_model import load_tokenizer, model_length
from coordexp.inference.infer import Inference
from coordexp.inference.settings import InferSettings


def record(num_objects, desc="traffic light"):
    objects = tuple(BoxObject(desc, "bbox_2d", (k, k, k + 1, k + 1)) for k in range(num_objects))
    return Record(("a.png",), 64, 64, objects)


def test_the_limit_holds_the_longest_ground_truth_and_half_as_much_again(real_tok):
    """A crowded image of COCO: 60 objects are more than the 1,024 tokens that suit most."""
    records = [record(n) for n in (0, 3, 60, 12)]
    num_tokens = len(real_tok.encode(serialize(records[2].objects)))
    assert num_tokens > 1024
    limit = answer_limit(records, real_tok)
    assert limit % 64 == 0
    assert 1.5 * num_tokens <= limit < 1.5 * num_tokens + 64


def test_few_or_no_objects_still_leave_room_for_forty_boxes(real_tok):
    assert answer_limit([record(0), record(2)], real_tok) == 1024
    assert answer_limit([], real_tok) == 1024
    assert len(real_tok.encode(serialize(record(40).objects))) < 1024


def test_tokens_count_and_not_letters(real_tok):
    """One long word of few tokens against many boxes with short ones."""
    few_tokens = record(1, desc="the " * 300)
    many = record(60, desc="a")
    alone = answer_limit([many], real_tok)
    assert answer_limit([few_tokens, many], real_tok) == alone


def test_inference_without_a_limit_takes_that_of_its_data(nano, tmp_path):
    """Half of the model's length at most; what is given wins."""
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")

    def write(num_objects):
        objects = [{"desc": "traffic light", "bbox_2d": [k, k, k + 1, k + 1]} for k in range(num_objects)]
        line = json.dumps({"images": ["a.png"], "width": 64, "height": 64, "objects": objects})
        (tmp_path / "d.jsonl").write_text(line + "\n")
        return tmp_path / "d.jsonl"

    def limit(num_objects, **settings):
        return Inference.prepare(nano, write(num_objects), tmp_path, InferSettings(**settings)).max_new_tokens

    expected = answer_limit([record(30)], load_tokenizer(nano))
    assert 1024 < expected < model_length(nano) // 2
    assert limit(30) == expected
    assert limit(1) == 1024
    assert limit(30, max_new_tokens=70) == 70
    assert limit(900) == model_length(nano) // 2


def test_a_model_folder_that_does_not_exist_is_said_before_anything_is_loaded(tmp_path, capsys):
    started = time.perf_counter()
    code = main(
        ["infer", "--model", str(tmp_path / "none"), "--data", "x.jsonl", "--output", str(tmp_path / "o")]
    )
    assert code == 2
    assert "none is not a model folder (no config.json)" in capsys.readouterr().err
    assert time.perf_counter() - started < 5
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("reasons", [["stop", "length", "length"], ["stop"] * 3])
def test_answers_cut_at_the_limit_are_counted(tmp_path, reasons):
    with PredictionLog.open(tmp_path, {"a": 1}, num_images=3, chunk_size=1, overwrite=False) as log:
        for image_id, reason in enumerate(reasons):
            log.append([{"image_id": image_id}], [{"image_id": image_id, "finish_reason": reason}])
        log.finish()
    num_cut = reasons.count("length")
    assert log.num_cut == num_cut
    assert (
        json.loads((tmp_path / "infer_run.json").read_text()).get("num_cut_at_max_new_tokens", 0) == num_cut
    )
    with PredictionLog.open(tmp_path, {"a": 1}, num_images=3, chunk_size=1, overwrite=False) as log:
        assert log.num_done == 3

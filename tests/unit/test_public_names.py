"""What `import coordexp` offers: at once, without torch, and the same names that `coordexp.api` documents."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import coordexp
from coordexp import api
from coordexp.codec.schema import BoxObject
from coordexp.errors import ContractError


def test_the_package_imports_without_torch_and_lists_its_names():
    code = (
        "import sys; sys.modules['torch'] = sys.modules['numpy'] = None\n"
        "import coordexp\n"
        "assert {'Detector', 'Detections', 'evaluate', 'load_records', 'match', 'parse'} <= set(dir(coordexp))\n"
        "assert [name for name in sys.modules if name.startswith('coordexp.')] == []\n"
        "print(coordexp.__version__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, coordexp.__version__), done.stderr


def test_every_name_is_that_of_the_api():
    assert set(coordexp.__all__) == {*api.__all__, "__version__"}
    for name in api.__all__:
        assert getattr(coordexp, name) is getattr(api, name)
        assert getattr(api, name).__doc__
    with pytest.raises(AttributeError, match="no attribute 'Detektor'"):
        coordexp.Detektor  # noqa: B018


def test_match_pairs_by_place():
    cat, dog = (
        BoxObject("cat", "bbox_2d", (0, 0, 100, 100)),
        BoxObject("dog", "bbox_2d", (500, 500, 700, 700)),
    )
    found = coordexp.match([dog, cat], [cat])
    assert (found.matched, found.unmatched_pred, found.unmatched_gt) == ([(1, 0)], [0], [])


def test_parse_reads_text_and_ids(real_tok):
    text = '{"objects": [{"desc": "cat", "bbox_2d": [<|coord_1|>, <|coord_2|>, <|coord_3|>, <|coord_4|>]}]}<|im_end|>'
    found = coordexp.parse(text, real_tok)
    assert [obj.as_box() for obj in found.objects] == [BoxObject("cat", "bbox_2d", (1, 2, 3, 4))]
    assert coordexp.parse(real_tok.encode(text, add_special_tokens=False), real_tok).objects == found.objects


def test_records_are_evaluated_with_coco_results(tmp_path: Path):
    data = tmp_path / "d.jsonl"
    data.write_text(
        '{"images": ["a.png"], "width": 1000, "height": 1000, "objects": [{"desc": "cat", "bbox_2d": [0, 0, 9, 9]}]}\n'
    )
    (record,) = coordexp.load_records(data)
    assert record.objects == (BoxObject("cat", "bbox_2d", (0, 0, 9, 9)),)
    with pytest.raises(ContractError, match="records with Detections"):
        coordexp.evaluate([record], [{"image_id": 0}])
    with pytest.raises(ContractError, match="1 records and 0 detections"):
        coordexp.evaluate([record], [])

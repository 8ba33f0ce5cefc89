"""Rows that teach names on the model's own prefix may point at another token than the next: at a name of the record."""

from __future__ import annotations

from dataclasses import asdict
from types import SimpleNamespace

import pytest

from coordexp.audit.findings import DifferenceError
from coordexp.audit.token_flow import SampleTokens, _check_taught_names
from coordexp.codec.coord_vocab import CoordVocab
from coordexp.codec.forms.choose import form_of
from coordexp.codec.parse import parse_rollout
from coordexp.codec.schema import BoxObject
from coordexp.losses.columns import CoordColumns
from coordexp.matching import match_objects
from coordexp.models.tiny_tokenizer import train_tiny_tokenizer
from coordexp.targets import TargetBuilder
from coordexp.targets.rows import stage2_rows

BINS = (10, 20, 300, 400)


def flow_of(tok, written, true):
    """The dumped sample of an answer with one object called `written`, where the record has one called `true`."""
    form = form_of()
    ids = tok.encode(form.serialize([BoxObject(written, "bbox_2d", BINS)]), add_special_tokens=False)
    parsed, gts = parse_rollout(ids, tok), [BoxObject(true, "bbox_2d", BINS)]
    sample = TargetBuilder(tok, teaches_names=True).from_rollout(
        [1], parsed, match_objects(parsed.objects, gts), gts, generation_prompt_ids=[1], sample_id="a"
    )
    rows = asdict(stage2_rows([sample], [0], CoordColumns(CoordVocab.from_tokenizer(tok).ids)))
    forward = {"rows": rows, "is_rollout": True}
    ids_T = rows["targets_R"].new_tensor(sample.token_ids_T.tolist())
    return SampleTokens("a", forward, "step 0", 0, ids_T, slice(0, 0))


@pytest.mark.parametrize("written", ["red circle", "red box", "blue box", "red"])
def test_a_name_may_be_corrected_towards_one_of_the_record_and_no_other(written):
    tok = train_tiny_tokenizer()
    subject = SimpleNamespace(tokenizer=tok)
    flow = flow_of(tok, written, "red circle")
    record = SimpleNamespace(objects=[BoxObject("red circle", "bbox_2d", BINS)])
    _check_taught_names(flow, record, form_of(), subject)
    if written != "red circle":
        stranger = SimpleNamespace(objects=[BoxObject("green triangle", "bbox_2d", BINS)])
        with pytest.raises(DifferenceError, match="a matched name is taught to go on as"):
            _check_taught_names(flow, stranger, form_of(), subject)

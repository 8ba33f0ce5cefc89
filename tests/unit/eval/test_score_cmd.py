"""`coordexp score`: flags that nothing would read are refused."""

from __future__ import annotations

import pytest

from coordexp.cli.main import main


@pytest.mark.parametrize("method", [[], ["--method", "logprob"], ["--constant"]])
def test_flags_of_the_forward_pass_are_refused_where_no_model_is_asked(tmp_path, capsys, method):
    flags = ["--batch-size", "4", "--torch-dtype", "bfloat16"]
    assert main(["score", "--run", str(tmp_path), *method, *flags]) == 2
    told = capsys.readouterr().err
    assert "--batch-size, --torch-dtype" in told
    assert "expected_iou" in told
    assert "--model" not in told

"""An ms-swift plugin for tests: writes down every sample that is made for training, and when it was drawn.

SAMPLES_FILE: a JSON line for each: index, epoch and progress of the draw, the sample's id, and a hash of what the
model is shown.
"""

from __future__ import annotations

import hashlib
import os
from typing import Any

from coordexp.data.raw_samples import RawSample, RawSamples
from coordexp.data.samples import EncodedSamples
from coordexp.data.source import SampleSource
from coordexp.files import append_jsonl
from coordexp.swift_bridge.draws import Draw


def watched(original: Any) -> Any:
    def make(self: Any, index: Any) -> Any:
        sample = original(self, index)
        if isinstance(index, Draw) and index.progress is not None:
            content = _content(sample)
            shown = hashlib.sha256(b"".join(content)).hexdigest()
            sample_id = (
                sample.sample_id
                if isinstance(sample, RawSample)
                else SampleSource.of_sample(sample).sample_id
            )
            line = {
                "index": int(index),
                "epoch": index.epoch,
                "progress": index.progress,
                "id": sample_id,
                "shown": shown,
            }
            append_jsonl(os.environ["SAMPLES_FILE"], line)
        return sample

    return make


def _content(sample: Any) -> list[bytes]:
    if isinstance(sample, RawSample):
        assert sample.media is not None
        pixels, text = sample.media.pixel_values_PD, repr((sample.prompt_ids, sample.objects, sample.width))
        return [pixels.numpy().tobytes(), text.encode(), *map(_bytes, sample.images)]
    return [sample["pixel_values"].numpy().tobytes(), repr(sample["labels"]).encode()]


def _bytes(image: str | bytes) -> bytes:
    return image.encode() if isinstance(image, str) else image


for kind in (EncodedSamples, RawSamples):
    kind.__getitem__ = watched(kind.__getitem__)

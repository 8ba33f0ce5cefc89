"""A second ms-swift plugin for tests: plants the faults named in PLANTED_FAULTS in a training run."""

import copy
import os
from dataclasses import replace

import torch

from coordexp.data.batch_meta import BatchMeta
from coordexp.losses.stage1 import Stage1Terms
from coordexp.losses.sums import SumCount
from coordexp.metrics.keys_stage1 import BASE_CE_LOSS
from coordexp.rollout.backends.hf import HfBackend
from coordexp.swift_bridge.template import CoordQwen3VLTemplate
from coordexp.trainers import base

FAULTS = set(os.environ["PLANTED_FAULTS"].split(","))

honest_meta, honest_columns, honest_terms = base.with_meta, base.CoordColumns, Stage1Terms.metrics
honest_encode, honest_policy = CoordQwen3VLTemplate.encode, HfBackend.__init__


def spoiled_meta(collate, *options, **settings):
    finish = honest_meta(collate, *options, **settings)

    def collated(features):
        batch = finish(features)
        if "swapped_images" in FAULTS:
            per_image = int(batch["image_grid_thw"][0].prod())
            batch["pixel_values"] = batch["pixel_values"].roll(per_image, 0)
        if "shifted_labels" in FAULTS:
            meta = BatchMeta.take(batch)
            replace(meta, rows=replace(meta.rows, positions_R=meta.rows.positions_R - 1)).put(batch)
        return batch

    return collated


def spoiled_terms(terms):
    metrics = honest_terms(terms)
    if BASE_CE_LOSS in metrics:
        metrics[BASE_CE_LOSS] = SumCount(metrics[BASE_CE_LOSS].sum, metrics[BASE_CE_LOSS].count + 1)
    return metrics


def spoiled_encode(self, inputs, *args, **kwargs):
    if "dropped_system" in FAULTS and self.is_training and isinstance(inputs, dict):
        self.template_meta.default_system = "You find things."  # which inference does not know of
    processor = self.processor.image_processor
    size = processor.size
    if "pixel_budget" in FAULTS and self.is_training:
        self.limit_pixels(max_pixels=32 * 32)
    try:
        return honest_encode(self, inputs, *args, **kwargs)
    finally:
        processor.size = size  # the checkpoint says nothing of it


def frozen_policy(self, settings, model, *args, **kwargs):
    honest_policy(self, settings, model, *args, **kwargs)
    self._model = copy.deepcopy(model)  # from here on no push arrives


base.with_meta = spoiled_meta
CoordQwen3VLTemplate.encode = spoiled_encode
if "bin_order" in FAULTS:
    base.CoordColumns = lambda ids: honest_columns(tuple(reversed(tuple(ids))))
if "wrong_count" in FAULTS:
    Stage1Terms.metrics = spoiled_terms
if "lost_push" in FAULTS:
    HfBackend.__init__ = frozen_policy
torch.manual_seed(0)

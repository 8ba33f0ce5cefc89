"""What to supervise: token ids with a role for every token, and the coordinate slots with their true bins.

roles     TokenRole of a token, and how role and type decide over its supervision
sample    EncodedSample: one prompt with its target, from ground truth or from a rollout
builder   TargetBuilder makes samples; a sample whose end cannot be located becomes a DroppedSample
draft     a target in the making, piece by piece
prefix    roles of the rollout part of a target
rewrite   a rollout without some of its objects, and with missed ones where they belong
names     names of matched predictions, as far as they are taught
spelling  text to token ids that decode to exactly that text
rows      samples in a batch or a pack -> the supervised rows of a forward, and weights per token
counts    how much is supervised: what metrics and step-wide denominators need
"""

from __future__ import annotations

from coordexp.targets.builder import TargetBuilder
from coordexp.targets.roles import TokenRole
from coordexp.targets.sample import DroppedSample, EncodedSample, Media, SampleDropReason

__all__ = ["DroppedSample", "EncodedSample", "Media", "SampleDropReason", "TargetBuilder", "TokenRole"]

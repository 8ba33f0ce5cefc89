"""Pairs predictions with ground truth: Hungarian matching on mask IoU; Sinkhorn targets for polygon pairs."""

from coordexp.matching.hungarian import MatchResult, match_objects
from coordexp.matching.sinkhorn import barycentric_targets

__all__ = ["MatchResult", "barycentric_targets", "match_objects"]

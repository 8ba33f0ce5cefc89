"""Terms of a latent prefix, each a number per row, in float32 or float64.

kd         T^2 sum_o p(o) (log p(o) - log q(o)), p and q of teacher and student at temperature T over the outcomes o:
           the teacher's k likeliest tokens, and all other tokens together
state_kd   |s - t|^2 / |t|^2 of hidden states s, t of student and teacher
align      |v - m|^2 / |m|^2 of all M vectors of a sample, m the means of the text's embeddings over M parts
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from coordexp.losses.sums import math_dtype


@dataclass(frozen=True)
class TeacherRows:
    """A teacher's distributions over the next token, in short.

    token_ids_Rk: the likeliest tokens; None: every token in order of its id.
    log_probs_Rk: of those.  log_rest_R: of all others together; None where there are none.
    """

    token_ids_Rk: Tensor | None
    log_probs_Rk: Tensor
    log_rest_R: Tensor | None

    @classmethod
    def of_logits(cls, logits_RV: Tensor, *, top_k: int | None, temperature: float) -> TeacherRows:
        """Of one chunk of logits [r, V]; detached. top_k: None, or V and more, keeps every token."""
        logits_RV = math_dtype(logits_RV.detach()) / temperature
        log_probs_RV = logits_RV.log_softmax(-1)
        if top_k is None or top_k >= logits_RV.shape[-1]:
            return cls(None, log_probs_RV, None)
        log_probs_Rk, token_ids_Rk = log_probs_RV.topk(top_k, dim=-1)
        return cls(token_ids_Rk, log_probs_Rk, _log_rest(log_probs_RV, token_ids_Rk))

    @classmethod
    def joined(cls, parts: Sequence[TeacherRows]) -> TeacherRows:
        """Chunks as one. Needs at least one."""

        def join(tensors: list[Tensor | None]) -> Tensor | None:
            found = [tensor for tensor in tensors if tensor is not None]
            return torch.cat(found) if found else None

        return cls(
            join([part.token_ids_Rk for part in parts]),
            torch.cat([part.log_probs_Rk for part in parts]),
            join([part.log_rest_R for part in parts]),
        )


def kd_rows(logits_RV: Tensor, teacher: TeacherRows, temperature: float) -> Tensor:
    """[R]: the divergence of the student's distribution from the teacher's, times T^2."""
    log_q_RV = (math_dtype(logits_RV) / temperature).log_softmax(-1)
    ids = teacher.token_ids_Rk
    log_q_Rk = log_q_RV if ids is None else log_q_RV.gather(-1, ids)
    divergence_R = _expected(teacher.log_probs_Rk, log_q_Rk).sum(-1)
    if ids is not None and teacher.log_rest_R is not None:
        divergence_R = divergence_R + _expected(teacher.log_rest_R, _log_rest(log_q_RV, ids))
    return divergence_R * temperature**2


def state_kd_rows(student_RH: Tensor, teacher_RH: Tensor) -> Tensor:
    """[R]: squared distance of hidden states, relative to the squared length of the teacher's."""
    student_RH, teacher_RH = math_dtype(student_RH), math_dtype(teacher_RH.detach())
    length_R = teacher_RH.square().sum(-1).clamp(min=torch.finfo(teacher_RH.dtype).tiny)
    return (student_RH - teacher_RH).square().sum(-1) / length_R


def align_samples(vectors_SMH: Tensor, means_SMH: Tensor) -> Tensor:
    """[S]: squared distance of a sample's vectors to the means of its text, relative to the squared length of those."""
    return state_kd_rows(vectors_SMH.flatten(1), means_SMH.flatten(1))


def _expected(log_p: Tensor, log_q: Tensor) -> Tensor:
    """p (log p - log q), 0 where p is 0."""
    return torch.where(log_p == -torch.inf, 0.0, log_p.exp() * (log_p - log_q))


def _log_rest(log_probs_RV: Tensor, ids_Rk: Tensor) -> Tensor:
    """Log-probability of all tokens but `ids_Rk`, [R]."""
    return log_probs_RV.scatter(-1, ids_Rk, -torch.inf).logsumexp(-1)

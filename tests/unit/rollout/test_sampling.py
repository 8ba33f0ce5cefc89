"""Sampling by Gumbel noise: exact frequencies, a stream per row."""

from __future__ import annotations

import torch
from scipy.stats import chisquare
from transformers import RepetitionPenaltyLogitsProcessor

from coordexp.config.schema.rollout import Decoding
from coordexp.rollout.decoding.sampling import GumbelMax, RepetitionPenalty, samplers

LOGITS_V = torch.tensor([2.0, 1.0, 0.0, -1.0, 0.5, -3.0])
NO_IDS = torch.zeros(1, 0, dtype=torch.long)


def draws(decoding: Decoding, count: int) -> torch.Tensor:
    """Counts per token of `count` draws from one row."""
    processors = samplers(decoding, [7], torch.device("cpu"))
    tokens = [int(processors(NO_IDS, LOGITS_V[None].clone()).argmax()) for _ in range(count)]
    return torch.bincount(torch.tensor(tokens), minlength=LOGITS_V.numel())


def test_frequencies_are_the_softmax():
    for temperature in (1.0, 0.6):
        counts = draws(Decoding(temperature=temperature), 20_000)
        expected = (LOGITS_V / temperature).softmax(-1).double()
        assert chisquare(counts.numpy(), (expected / expected.sum() * 20_000).numpy()).pvalue > 1e-3


def test_top_k_and_top_p_cut_the_tail_and_renormalise():
    probs = LOGITS_V.softmax(-1)  # descending: tokens 0, 1, 4, 2, 3, 5
    counts = draws(Decoding(temperature=1.0, top_k=2), 5_000)
    assert set(counts.nonzero().flatten().tolist()) == {0, 1}
    assert abs(counts[0] / 5_000 - probs[0] / (probs[0] + probs[1])) < 0.02
    counts = draws(Decoding(temperature=1.0, top_p=float(probs[0] + probs[1] / 2)), 5_000)
    assert set(counts.nonzero().flatten().tolist()) == {0, 1}


def test_a_row_draws_from_its_own_stream():
    rows = LOGITS_V.expand(3, -1)
    together = GumbelMax([1, 2, 3], torch.device("cpu"))
    alone = GumbelMax([2], torch.device("cpu"))
    for _ in range(5):
        assert torch.equal(together(NO_IDS, rows)[1:2], alone(NO_IDS, rows[:1]))


def test_no_seed_touches_the_global_stream():
    before = torch.get_rng_state()
    draws(Decoding(temperature=1.0), 10)
    assert torch.equal(before, torch.get_rng_state())


def test_forbidden_tokens_are_never_drawn():
    scores = torch.full((1, 4), float("-inf"))
    scores[0, 2] = 0.0
    noise = GumbelMax([0], torch.device("cpu"))
    assert all(int(noise(NO_IDS, scores).argmax()) == 2 for _ in range(200))


def test_greedy_decoding_needs_no_processor():
    assert len(samplers(Decoding(), [1, 2], torch.device("cpu"))) == 0


def test_the_penalty_is_that_of_transformers_where_nothing_is_padded():
    ids = torch.tensor([[1, 3, 3, 5], [0, 2, 4, 4]])
    scores = torch.randn(2, 6, generator=torch.Generator().manual_seed(0))
    ours = RepetitionPenalty(1.3, torch.ones(2, 2))(ids, scores.clone())
    assert torch.equal(ours, RepetitionPenaltyLogitsProcessor(1.3)(ids, scores.clone()))


def test_the_penalty_spares_padding():
    ids, mask = torch.tensor([[0, 0, 3, 1]]), torch.tensor([[0, 0, 1]])
    scores = torch.ones(1, 5)
    assert RepetitionPenalty(2.0, mask)(ids, scores).tolist() == [[1.0, 0.5, 1.0, 0.5, 1.0]]

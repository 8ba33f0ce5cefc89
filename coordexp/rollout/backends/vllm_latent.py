"""Answers of a vLLM engine to questions whose text is read as latent vectors.

The engine is given token ids and picture as ever, and the vectors as one more item of the question, of vLLM's modality
`prompt_embeds`: it embeds them in the place of the latent tokens, beside the embeddings of the picture. Positions
(M-RoPE) come from the token ids, and what is cached is told apart by a hash of the vectors.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from hashlib import sha256
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from coordexp.models.latent_prefix.prompts import PromptVectors
from coordexp.rollout.backends.latent import LatentRequest, latent_request
from coordexp.rollout.backends.vllm_offline import VllmOfflineBackend
from coordexp.rollout.time_limit import TimeLimit
from coordexp.rollout.types import Rollout, RolloutRequest
from coordexp.swift_bridge.vllm_engine import prompt_with_picture

MODALITY = "prompt_embeds"
_KEPT_TEXTS = 256


class _Item(NamedTuple):
    """rows_MW: as the engine embeds them.  key: what tells them from others."""

    rows_MW: Tensor
    key: str


class LatentVllmBackend(VllmOfflineBackend):
    """As `VllmOfflineBackend`: the text of each question becomes the latent tokens, embedded as its vectors.

    vectors: of a text.  embedding: of the model's tokens, which they are made from; both on one device.
    """

    def __init__(self, *args: Any, vectors: PromptVectors, embedding: nn.Module, **kwargs: Any) -> None:
        super().__init__(*args, submitted_by=self._submit, **kwargs)
        self._vectors = vectors
        self._embedding = embedding
        self._item = lru_cache(_KEPT_TEXTS)(self._made)

    def _answers(
        self, requests: Sequence[RolloutRequest], max_new_tokens: int, time_limit: TimeLimit | None
    ) -> list[Rollout]:
        latent = [latent_request(request, self._vectors.num_latents) for request in requests]
        return super()._answers(latent, max_new_tokens, time_limit)

    def _submit(self, engine_id: str, request: RolloutRequest, inputs: dict[str, Any], sampling: Any) -> None:
        assert isinstance(request, LatentRequest)
        prompt = prompt_with_picture(inputs)
        asked = _with_rows(self._engine.engine, prompt, self._vectors.latent_ids_M, self._item(request.text))
        self._engine.engine.add_request(engine_id, asked, sampling)

    @torch.no_grad()
    def _made(self, text: str) -> _Item:
        vectors_MH = self._vectors(self._embedding, [text])[0].float().cpu()
        key = sha256(vectors_MH.contiguous().numpy().tobytes()).hexdigest()
        config = self._engine.engine.model_config
        levels = len(config.hf_config.vision_config.deepstack_visual_indexes)
        return _Item(as_engine_rows(vectors_MH.to(config.dtype), levels), f"{MODALITY}-{key}")


def as_engine_rows(vectors_MH: Tensor, levels: int) -> Tensor:
    """[M, H * (1 + levels)]: vectors as a Qwen3-VL engine embeds a picture.

    There, what the deepstack layers add to the first `levels` layers of the language model stands behind each
    embedding, and all that one step embeds is one matrix. To text, and so to vectors, they add nothing.
    """
    return nn.functional.pad(vectors_MH, (0, levels * vectors_MH.shape[1]))


def _with_rows(core: Any, prompt: dict[str, Any], latent_ids_M: Tensor, item: _Item) -> Any:
    """A prompt as the engine takes it, with rows in the place of its latent tokens."""
    from vllm.multimodal.inputs import (
        MultiModalFieldElem,
        MultiModalKwargsItem,
        MultiModalSharedField,
        PlaceholderRange,
    )
    from vllm.renderers.inputs.preprocess import parse_model_prompt

    [asked] = core.renderer.render_cmpl([parse_model_prompt(core.model_config, prompt)])
    start = list(asked["prompt_token_ids"]).index(int(latent_ids_M[0]))
    rows = MultiModalFieldElem(data=item.rows_MW, field=MultiModalSharedField(batch_size=1))
    place = PlaceholderRange(offset=start, length=len(item.rows_MW))
    asked["mm_kwargs"][MODALITY] = [MultiModalKwargsItem({"embedding": rows})]
    asked["mm_hashes"] = {**asked["mm_hashes"], MODALITY: [item.key]}
    asked["mm_placeholders"] = {**asked["mm_placeholders"], MODALITY: [place]}
    return asked

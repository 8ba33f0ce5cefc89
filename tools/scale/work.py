"""What a forward, a backward, an update and an answer ask of a device, in countable units, and the seconds they take.

    seconds = operations / rate + bytes / rate + logits / rate + launches x seconds of one

with launches hidden behind the rest on a device that works beside its host.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from scale.rates import Rates
from scale.shapes import (
    FP32,
    ModelShape,
    Pass,
    head_products,
    language_attention,
    language_products,
    layer_kept,
    merger_kept,
    patch_products,
    vision_attention,
    vision_layer_kept,
    vision_products,
)

LAYER_LAUNCHES, VISION_LAUNCHES, IMAGE_LAUNCHES, FORWARD_LAUNCHES = (46, 95), (23, 38), (41, 3), (128, 41)
"""Kernels of a language layer, a vision layer, a picture, and a pass besides: forward, backward; views left out."""
TOKEN_LAUNCHES = (48, 46)
"""Kernels of a decoded token: of a layer, and besides."""
FORWARD_TOUCHES, BACKWARD_TOUCHES = 2, 3
"""What autograd keeps: written and read in the forward; read, and its gradient written and read, in the backward."""
FLASH_BACKWARD = 2.5
"""Attention's backward computes five products for the two of the forward: scores are computed anew."""
ADAM_NUMBERS = 9
"""Of a weight: itself, gradient and two moments read, three of them written; to clip, the gradient read and written."""


@dataclass(frozen=True)
class Work:
    """products, attention: operations.  traffic: bytes that all other kernels read and write.

    scores: logits that the loss, or the choice of a token, looks at.  launches: kernels.
    """

    products: float = 0.0
    attention: float = 0.0
    traffic: float = 0.0
    scores: float = 0.0
    launches: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(
            self.products + other.products,
            self.attention + other.attention,
            self.traffic + other.traffic,
            self.scores + other.scores,
            self.launches + other.launches,
        )

    def __mul__(self, times: float) -> Work:
        return Work(
            self.products * times,
            self.attention * times,
            self.traffic * times,
            self.scores * times,
            self.launches * times,
        )

    def seconds(self, rates: Rates, *, launch_s: float | None = None) -> float:
        """On a device of these rates. launch_s: of a kernel, in place of theirs."""
        device = (
            self.products / rates.products
            + self.attention / rates.attention
            + self.traffic / rates.traffic
            + self.scores / rates.scores
        )
        launching = self.launches * (rates.launch_s if launch_s is None else launch_s)
        return max(device, launching) if rates.device_beside_host else device + launching


@dataclass(frozen=True)
class Training:
    """How a model is trained. width: bytes of a number in forward and backward.  lora_rank: 0 trains all weights."""

    width: int = FP32
    checkpointing: bool = False
    vision_trained: bool = True
    lora_rank: int = 0


def forward_work(shape: ModelShape, one: Pass, how: Training) -> Work:
    """Of a forward with its loss."""
    return _language(shape, one, how) + _vision(shape, one, how) + _head(shape, one.rows)


def backward_work(shape: ModelShape, one: Pass, how: Training) -> Work:
    """Of its backward; with checkpointing the layers run forward once more."""
    language, vision = _language(shape, one, how), _vision(shape, one, how)
    found = _backward(
        language, LAYER_LAUNCHES[1] * shape.layers + FORWARD_LAUNCHES[1], by_weights=how.lora_rank == 0
    )
    head = _head(shape, one.rows)
    found += replace(head, products=head.products * (1 if how.lora_rank else 2))
    if how.lora_rank:
        found += Work(products=4.0 * shape.lora_parameters(how.lora_rank) * one.tokens)
    if how.checkpointing:
        found += language
    if how.vision_trained:
        launches = VISION_LAUNCHES[1] * shape.vision_layers + IMAGE_LAUNCHES[1] * one.images
        found += _backward(vision, launches if one.images else 0.0, by_weights=True)
        found += Work(products=-patch_products(shape, one.patches))  # pixels need no gradient
        if how.checkpointing:
            found += vision
    return found


def _backward(forward: Work, launches: float, *, by_weights: bool) -> Work:
    return Work(
        products=forward.products * (2 if by_weights else 1),
        attention=forward.attention * FLASH_BACKWARD,
        traffic=forward.traffic * BACKWARD_TOUCHES / FORWARD_TOUCHES,
        launches=launches,
    )


def _language(shape: ModelShape, one: Pass, how: Training) -> Work:
    kept = shape.layers * layer_kept(shape, one.tokens, width=how.width, mask_row=one.mask_row)
    return Work(
        products=language_products(shape, one.tokens),
        attention=language_attention(shape, one.pairs),
        traffic=FORWARD_TOUCHES * kept,
        launches=LAYER_LAUNCHES[0] * shape.layers + FORWARD_LAUNCHES[0],
    )


def _vision(shape: ModelShape, one: Pass, how: Training) -> Work:
    if not one.patches:
        return Work()
    kept = shape.vision_layers * vision_layer_kept(shape, one.patches, width=how.width)
    kept += (1 + shape.deepstack) * merger_kept(shape, one.patches, width=how.width)
    return Work(
        products=patch_products(shape, one.patches) + vision_products(shape, one.patches),
        attention=vision_attention(shape, one.patch_pairs),
        traffic=FORWARD_TOUCHES * kept,
        launches=VISION_LAUNCHES[0] * shape.vision_layers + IMAGE_LAUNCHES[0] * one.images,
    )


def _head(shape: ModelShape, rows: int) -> Work:
    return Work(products=head_products(shape, rows), scores=float(rows) * shape.vocab)


def update_bytes(weights: float, *, width: int = FP32) -> float:
    """Bytes that Adam reads and writes for `weights` weights, clipping included. width: of a gradient."""
    return weights * ((ADAM_NUMBERS - 3) * FP32 + 3 * width)


def prefill_work(shape: ModelShape, one: Pass, how: Training) -> Work:
    """Of reading questions: a forward whose head sees the last token of each."""
    return forward_work(shape, replace(one, rows=one.samples), how)


def decode_work(shape: ModelShape, answers: float, context: float, *, width: int) -> Work:
    """Of one more token of `answers` answers, `context` tokens behind each: weights and cache are read whole."""
    weights = width * (shape.language + shape.vocab * shape.hidden)
    cache = answers * context * shape.kv_bytes(width)
    return Work(
        products=answers * (language_products(shape, 1) + head_products(shape, 1)),
        attention=language_attention(shape, answers * context),
        traffic=weights + cache,
        scores=answers * shape.vocab,
        launches=TOKEN_LAUNCHES[0] * shape.layers + TOKEN_LAUNCHES[1],
    )

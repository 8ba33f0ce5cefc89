"""Bytes of training on one GPU: weights, gradients and optimizer under DDP and ZeRO, activations, the head.

The peak of a step is the largest of three moments: the loss (everything kept, and the logits), the backward (with
checkpointing: inputs and gradients so far, and one layer whole), the update (all gradients).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from scale.shapes import BF16, FP32, ModelShape, Pass, activation_bytes, layer_kept
from scale.work import Training

CHUNK_BYTES = {"cpu": 80 * 2**20, "cuda": 512 * 2**20}
"""Logits of a chunk of the fused head (`coordexp.head.run.CHUNK_BYTES`)."""
NUM_BINS = 1000
COORD_COPIES = 6
"""Of the coordinate columns of a chunk: taken out, shifted, scaled, their exponentials and the gradients of these."""
DDP, ZERO_1, ZERO_2, ZERO_3 = 0, 1, 2, 3


def state_bytes(parameters: float, *, gpus: int, zero: int) -> float:
    """Weights, gradients and Adam's states on one GPU in bfloat16 mixed precision.

    A parameter has 2 bytes of weight, 2 of gradient, and 12 of float32 copy and two moments. ZeRO-1 divides the 12 over
    the GPUs, ZeRO-2 the gradients too, ZeRO-3 the weights too.
    """
    weight, gradient, adam = BF16, BF16, 3 * FP32
    return parameters * (
        weight / (gpus if zero >= ZERO_3 else 1)
        + gradient / (gpus if zero >= ZERO_2 else 1)
        + adam / (gpus if zero >= ZERO_1 else 1)
    )


def plain_head_bytes(rows: float, vocab: int, *, coord_rows: float = 0, width: int = BF16) -> float:
    """Of a loss on logits that are all there: logits, log-softmax of text rows in float32, and gradients of both."""
    gradients = FP32 if width == FP32 else FP32 + width
    return vocab * (rows * width + (rows - coord_rows) * FP32 + rows * gradients)


def fused_head_bytes(
    shape: ModelShape, rows: float, *, coord_rows: float = 0, width: int = BF16, device: str = "cuda"
) -> float:
    """Of the fused head: a chunk of logits and its coordinate columns; float32 gradients of hidden states and head."""
    fitting = max(CHUNK_BYTES[device] // (FP32 * shape.vocab) // 32 * 32, 32)
    chunk = min(float(fitting), max(rows - coord_rows, coord_rows))
    logits = chunk * shape.vocab * (FP32 + (width if width != FP32 else 0))
    columns = chunk * min(NUM_BINS, shape.vocab) * FP32 * COORD_COPIES
    return logits + columns + rows * shape.hidden * (width + FP32) + FP32 * shape.vocab * shape.hidden


@dataclass(frozen=True)
class StepMemory:
    """Bytes on one GPU: weights and optimizer between steps, and by how much a step grows beyond them."""

    weights: float
    optimizer: float
    growth: float
    """At the peak: gradients, activations, head."""
    activations: float
    head: float

    @property
    def peak(self) -> float:
        return self.weights + self.optimizer + self.growth


def trained_parameters(shape: ModelShape, how: Training) -> float:
    """Parameters that get gradients."""
    if how.lora_rank:
        return shape.lora_parameters(how.lora_rank)
    return shape.parameters - (0 if how.vision_trained else shape.vision)


def step_memory(
    shape: ModelShape,
    passes: Sequence[Pass],
    how: Training,
    *,
    gpus: int = 1,
    zero: int = DDP,
    head: str = "fused",
    graphs: int = 1,
    device: str = "cuda",
) -> StepMemory:
    """Of a step of `passes` forwards on one of `gpus` GPUs.

    head: plain or fused.  graphs: forwards whose activations are kept together (self-context, unrolled).
    In float32 (width 4) the weights are their own master copy.
    """
    trained = trained_parameters(shape, how)
    share = gpus if zero >= ZERO_1 else 1
    weights = shape.parameters * how.width / (gpus if zero >= ZERO_3 else 1)
    optimizer = trained * (2 if how.width == FP32 else 3) * FP32 / share
    gradients = trained * how.width / (gpus if zero >= ZERO_2 else 1)
    peak = activations = at_head = 0.0
    for index, one in enumerate(passes):
        before = gradients if index else 0.0
        kept = graphs * activation_bytes(
            shape, one, width=how.width, checkpointing=False, vision_trained=how.vision_trained
        )
        layer = 0.0
        if how.checkpointing:
            kept = graphs * activation_bytes(
                shape, one, width=how.width, checkpointing=True, vision_trained=how.vision_trained
            )
            layer = layer_kept(shape, one.tokens, width=how.width, mask_row=one.mask_row)
            kept -= graphs * layer
        of_head = _head_bytes(shape, one, how, head, device)
        moments = (before + kept + of_head, before + kept + layer, gradients + layer)
        if max(moments) >= peak:
            peak, activations, at_head = max(moments), kept + layer, of_head
    return StepMemory(weights, optimizer, max(peak, gradients), activations, at_head)


def _head_bytes(shape: ModelShape, one: Pass, how: Training, head: str, device: str) -> float:
    if head == "plain":
        return plain_head_bytes(one.rows, shape.vocab, coord_rows=one.coord_rows, width=how.width)
    return fused_head_bytes(shape, one.rows, coord_rows=one.coord_rows, width=how.width, device=device)

"""The sizes of a Qwen3-VL, and what follows from them alone: parameters, operations, kept activations, cache.

A forward is told by its `Pass`: how many tokens, how they attend, how many patches, how many supervised rows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

BF16, FP32 = 2, 4


@dataclass(frozen=True)
class ModelShape:
    """Figures of a config.json (`text_config`, `vision_config`)."""

    name: str
    hidden: int
    layers: int
    heads: int
    mlp: int
    tied: bool
    vision_hidden: int
    vision_layers: int
    vision_mlp: int
    kv_heads: int = 8
    head_dim: int = 128
    vocab: int = 151_936
    deepstack: int = 3
    vision_heads: int = 16
    patch: int = 16
    merge: int = 2
    temporal: int = 2
    positions: int = 2304

    @classmethod
    def from_config(cls, name: str, config: Mapping[str, Any]) -> ModelShape:
        """Of a config.json as a mapping."""
        text, vision = config["text_config"], config["vision_config"]
        return cls(
            name=name,
            hidden=text["hidden_size"],
            layers=text["num_hidden_layers"],
            heads=text["num_attention_heads"],
            mlp=text["intermediate_size"],
            tied=bool(config.get("tie_word_embeddings", text.get("tie_word_embeddings", False))),
            vision_hidden=vision["hidden_size"],
            vision_layers=vision["depth"],
            vision_mlp=vision["intermediate_size"],
            kv_heads=text["num_key_value_heads"],
            head_dim=text["head_dim"],
            vocab=text["vocab_size"],
            deepstack=len(vision["deepstack_visual_indexes"]),
            vision_heads=vision["num_heads"],
            patch=vision["patch_size"],
            merge=vision["spatial_merge_size"],
            temporal=vision["temporal_patch_size"],
            positions=vision["num_position_embeddings"],
        )

    @property
    def q_width(self) -> int:
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        return self.kv_heads * self.head_dim

    @property
    def layer_matrices(self) -> int:
        """Weights of the matrix products of one layer: q, k, v, o and the three of the MLP."""
        return self.hidden * (2 * self.q_width + 2 * self.kv_width + 3 * self.mlp)

    @property
    def language(self) -> int:
        """Parameters of the layers and the last norm."""
        norms = 2 * self.hidden + 2 * self.head_dim
        return self.layers * (self.layer_matrices + norms) + self.hidden

    @property
    def embeddings(self) -> int:
        """Parameters of the embedding and, where it is not tied, of the head."""
        return self.vocab * self.hidden * (1 if self.tied else 2)

    @property
    def patch_pixels(self) -> int:
        """Numbers of one patch."""
        return 3 * self.temporal * self.patch**2

    @property
    def wide(self) -> int:
        """Width of the patches that become one visual token."""
        return self.vision_hidden * self.merge**2

    @property
    def vision_matrices(self) -> int:
        """Weights of the matrix products of one layer of the vision tower."""
        return self.vision_hidden * (4 * self.vision_hidden + 2 * self.vision_mlp)

    @property
    def merger_matrices(self) -> int:
        """Weights of the matrix products of one merger; there is one, and one for each layer of deepstack."""
        return self.wide * (self.wide + self.hidden)

    @property
    def vision(self) -> int:
        """Parameters of the vision tower: patches, positions, layers, merger, and those of deepstack."""
        width, wide = self.vision_hidden, self.wide
        embedding = self.patch_pixels * width + width + self.positions * width
        biases_and_norms = (4 * width + self.vision_mlp + width) + 4 * width
        merger = self.merger_matrices + wide + self.hidden
        return (
            embedding
            + self.vision_layers * (self.vision_matrices + biases_and_norms)
            + (merger + 2 * width)
            + self.deepstack * (merger + 2 * wide)
        )

    @property
    def parameters(self) -> int:
        return self.language + self.embeddings + self.vision

    def lora_parameters(self, rank: int) -> int:
        """Of LoRA on every linear layer of the language model: rank x (in + out) for each."""
        h, q, kv, mlp = self.hidden, self.q_width, self.kv_width, self.mlp
        return self.layers * rank * ((h + q) * 2 + (h + kv) * 2 + (h + mlp) * 3)

    def kv_bytes(self, width: int = BF16) -> int:
        """Keys and values of one token in all layers. width: bytes of a number."""
        return 2 * self.layers * self.kv_width * width

    def visual_tokens(self, width: int, height: int, max_pixels: int) -> int:
        """Of a picture: one for 32 x 32 pixels (2 x 2 patches), after scaling it to `max_pixels` at most."""
        side = self.patch * self.merge
        scale = min(1.0, math.sqrt(max_pixels / (width * height)))
        rounded = math.floor if scale < 1 else round
        return max(1, rounded(width * scale / side)) * max(1, rounded(height * scale / side))


MODELS = {
    shape.name: shape
    for shape in (
        ModelShape("2B", 2048, 28, 16, 6144, True, 1024, 24, 4096),
        ModelShape("4B", 2560, 36, 32, 9728, True, 1024, 24, 4096),
        ModelShape("8B", 4096, 36, 32, 12288, False, 1152, 27, 4304),
        ModelShape("32B", 5120, 64, 64, 25600, False, 1152, 27, 4304),
    )
}


GPU_BLOCK, CPU_BLOCK = 128, 512
"""Keys that attention kernels take at once: flash attention's, and those of torch on a CPU."""


def causal_pairs(length: int, block: int = GPU_BLOCK) -> float:
    """Pairs that a causal kernel computes: it leaves out whole blocks of `block` keys that lie behind a token."""
    return float(sum((length - start) * min(block, length - start) for start in range(0, length, block)))


@dataclass(frozen=True)
class Pass:
    """One forward of one rank.

    tokens: of the batch or pack, padding included.  pairs: token pairs that attention computes (a causal kernel leaves
    out half, an explicit mask nothing).  mask_row: tokens of a row of an explicit mask, 0 without one.
    patches: of all pictures.  patch_pairs: pairs of patches that attention computes.  rows: supervised.  coord_rows: of
    them coordinates.  images, samples: how many.
    """

    tokens: int
    pairs: float
    rows: int
    coord_rows: int = 0
    patches: int = 0
    patch_pairs: float = 0.0
    images: int = 0
    samples: int = 1
    mask_row: int = 0

    @classmethod
    def padded(
        cls,
        lengths: tuple[int, ...],
        rows: int,
        *,
        coord_rows: int = 0,
        patches: int = 0,
        masked: bool | None = None,
        block: int = GPU_BLOCK,
    ) -> Pass:
        """Samples side by side. patches: of each, one picture.  masked: default: where lengths differ.

        block: see `causal_pairs`.
        """
        longest, number = max(lengths), len(lengths)
        has_mask = len(set(lengths)) > 1 if masked is None else masked
        pairs = float(longest * longest) if has_mask else causal_pairs(longest, block)
        return cls(
            tokens=number * longest, pairs=number * pairs, rows=rows, coord_rows=coord_rows,
            patches=number * patches, patch_pairs=float(number * patches**2), images=number if patches else 0,
            samples=number, mask_row=longest if has_mask else 0,
        )  # fmt: skip

    @classmethod
    def packed(
        cls,
        lengths: tuple[int, ...],
        rows: int,
        *,
        coord_rows: int = 0,
        patches: int = 0,
        masked: bool = False,
    ) -> Pass:
        """Samples one after another. masked: by an explicit mask (sdpa) and not by their lengths (flash attention)."""
        total, number = sum(lengths), len(lengths)
        pairs = float(total * total) if masked else sum(causal_pairs(length) for length in lengths)
        return cls(
            tokens=total, pairs=pairs, rows=rows, coord_rows=coord_rows, patches=number * patches,
            patch_pairs=float(number * patches**2), images=number if patches else 0, samples=number,
            mask_row=total if masked else 0,
        )  # fmt: skip


# --- operations -------------------------------------------------------------------------------------------------------


def language_products(shape: ModelShape, tokens: int) -> float:
    """Operations of the matrix products of the layers, forward: 2 for a weight and token."""
    return 2.0 * shape.layers * shape.layer_matrices * tokens


def language_attention(shape: ModelShape, pairs: float) -> float:
    """Operations of attention in the layers, forward: scores and their sum over values, 2 x width for a pair each."""
    return 4.0 * shape.layers * shape.q_width * pairs


def head_products(shape: ModelShape, rows: int) -> float:
    """Operations of the output head, forward."""
    return 2.0 * shape.vocab * shape.hidden * rows


def patch_products(shape: ModelShape, patches: int) -> float:
    """Operations of what turns pixels into patches, forward. Pixels need no gradient."""
    return 2.0 * shape.patch_pixels * shape.vision_hidden * patches


def vision_products(shape: ModelShape, patches: int) -> float:
    """Operations of the matrix products of layers and mergers of the vision tower, forward."""
    layers = 2.0 * shape.vision_layers * shape.vision_matrices * patches
    return layers + 2.0 * (1 + shape.deepstack) * shape.merger_matrices * (patches / shape.merge**2)


def vision_attention(shape: ModelShape, patch_pairs: float) -> float:
    """Operations of attention in the vision tower, forward."""
    return 4.0 * shape.vision_layers * shape.vision_hidden * patch_pairs


def forward_flops(shape: ModelShape, one: Pass) -> float:
    """All operations of a forward."""
    return (
        language_products(shape, one.tokens)
        + language_attention(shape, one.pairs)
        + head_products(shape, one.rows)
        + patch_products(shape, one.patches)
        + vision_products(shape, one.patches)
        + vision_attention(shape, one.patch_pairs)
    )


# --- what autograd keeps ----------------------------------------------------------------------------------------------


def layer_kept(shape: ModelShape, tokens: int, *, width: int = BF16, mask_row: int = 0) -> float:
    """Bytes that autograd keeps of one language layer.

    A norm keeps its input in float32, that input normed, and its product with the weight, which the matrix products
    behind it keep; in float32 input and residual are one. Of q and k: their own norm (input and normed) and what is
    rotated; v, and the answer of attention. Of the MLP: gate, its activation, up, and the product of both. Float32
    numbers for each token: a root for every norm and a log-sum for every head. A mask is kept as numbers.
    width: bytes of a number.  mask_row: tokens of a row of an explicit mask; keys and values are then repeated for all
    heads.
    """
    q, kv = shape.q_width, shape.kv_width
    served = q if mask_row else kv
    channels = (
        2 * shape.hidden * (FP32 + 2 * width)
        + (q + kv) * (FP32 + width)
        + (q + 2 * served + q) * width
        + 4 * shape.mlp * width
    )
    numbers = FP32 * (2 + shape.heads + shape.kv_heads + shape.heads)
    return tokens * (channels + numbers + mask_row * width)


def vision_layer_kept(shape: ModelShape, patches: int, *, width: int = BF16) -> float:
    """Bytes that autograd keeps of one layer of the vision tower.

    Inputs and outputs of both norms, q, k and v as they were made and rotated, the answer of attention by picture and
    joined, and the MLP before and after its activation; float32: two numbers of each norm and a log-sum for every head.
    """
    h, mlp = shape.vision_hidden, shape.vision_mlp
    return patches * (width * (4 * h + 3 * h + 2 * h + 2 * h + 2 * mlp) + FP32 * (4 + shape.vision_heads))


def activation_bytes(
    shape: ModelShape, one: Pass, *, width: int, checkpointing: bool, vision_trained: bool
) -> float:
    """What autograd keeps of a forward, the head left out; with checkpointing the input of each layer and one whole."""
    layer = layer_kept(shape, one.tokens, width=width, mask_row=one.mask_row)
    language = (
        shape.layers * width * one.tokens * shape.hidden + layer if checkpointing else shape.layers * layer
    )
    language += one.tokens * shape.hidden * (FP32 + width)  # the last norm
    if not (vision_trained and one.patches):
        return language
    layer = vision_layer_kept(shape, one.patches, width=width)
    inputs = shape.vision_layers * width * one.patches * shape.vision_hidden
    vision = inputs if checkpointing else shape.vision_layers * layer
    vision += one.patches * shape.patch_pixels * width
    return language + vision + (1 + shape.deepstack) * merger_kept(shape, one.patches, width=width)


def merger_kept(shape: ModelShape, patches: int, *, width: int = BF16) -> float:
    """Bytes that autograd keeps of one merger: input and output of its norm, and what surrounds its activation."""
    return width * (patches / shape.merge**2) * 4 * shape.wide

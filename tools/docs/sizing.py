"""Memory and hours of training Qwen3-VL, by formula: the tables of runbooks/sizing.md.

    python tools/docs/sizing.py                         # print them
    python tools/docs/sizing.py --gpus 16 --pictures 500000 --objects 12 --mfu 0.3
    python tools/docs/sizing.py --write                 # into runbooks/sizing.md

Everything here is computed, nothing is measured. Bytes are bytes, GB are 10^9 of them.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

PAGE = Path(__file__).resolve().parents[2] / "runbooks/sizing.md"
START, END = "<!-- tables of tools/docs/sizing.py -->\n", "<!-- end of tables -->\n"
BF16, FP32 = 2, 4
PATCH, MERGE, POSITIONS, TEMPORAL = 16, 2, 2304, 2


@dataclass(frozen=True)
class Model:
    """A Qwen3-VL: figures of its config.json (`text_config`, `vision_config`)."""

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
    def vision_matrices(self) -> int:
        """Weights of the matrix products of one layer of the vision tower."""
        return self.vision_hidden * (4 * self.vision_hidden + 2 * self.vision_mlp)

    @property
    def vision(self) -> int:
        """Parameters of the vision tower: patches, positions, layers, merger, and those of deepstack."""
        width, wide = self.vision_hidden, self.vision_hidden * MERGE**2
        embedding = 3 * TEMPORAL * PATCH**2 * width + width + POSITIONS * width
        layer = (
            self.vision_matrices + (4 * width + self.vision_mlp + width) + 4 * width
        )  # products, biases, norms
        merger = wide * wide + wide + wide * self.hidden + self.hidden
        return (
            embedding
            + self.vision_layers * layer
            + (merger + 2 * width)
            + self.deepstack * (merger + 2 * wide)
        )

    @property
    def parameters(self) -> int:
        return self.language + self.embeddings + self.vision


MODELS = (
    Model("2B", 2048, 28, 16, 6144, True, 1024, 24, 4096),
    Model("4B", 2560, 36, 32, 9728, True, 1024, 24, 4096),
    Model("8B", 4096, 36, 32, 12288, False, 1152, 27, 4304),
)


def state_bytes(parameters: int, *, gpus: int, zero: int) -> float:
    """Weights, gradients and Adam's states on one GPU under DeepSpeed with bfloat16.

    A parameter has 2 bytes of weight, 2 of gradient, and 12 of float32 copy and two moments. ZeRO-1 divides the 12 over
    the GPUs, ZeRO-2 the gradients too, ZeRO-3 the weights too.
    """
    weight, gradient, adam = BF16, BF16, 3 * FP32
    return parameters * (
        weight / (gpus if zero >= 3 else 1)
        + gradient / (gpus if zero >= 2 else 1)
        + adam / (gpus if zero >= 1 else 1)
    )


def lora_parameters(model: Model, rank: int) -> int:
    """Of LoRA on every linear layer of the language model: rank x (in + out) for each."""
    h, q, kv, mlp = model.hidden, model.q_width, model.kv_width, model.mlp
    return model.layers * rank * ((h + q) * 2 + (h + kv) * 2 + (h + mlp) * 3)


def layer_activation_bytes(model: Model, tokens: int) -> int:
    """What autograd keeps of one layer, with flash attention.

    Two norms (float32 input and bfloat16 output: 6 bytes a channel each), inputs of both blocks and the residual
    (2 bytes each), norms and rotation of q and k (10 bytes), q, k, v and the answer of attention (2 bytes), and four
    MLP tensors (2 bytes).
    """
    return tokens * (
        18 * model.hidden
        + 10 * (model.q_width + model.kv_width)
        + 2 * (2 * model.q_width + 2 * model.kv_width)
        + 8 * model.mlp
    )


def activation_bytes(model: Model, tokens: int, *, checkpointing: bool) -> int:
    """Of the language model: every layer, or with gradient checkpointing the input of each and one layer whole."""
    one = layer_activation_bytes(model, tokens)
    return model.layers * BF16 * tokens * model.hidden + one if checkpointing else model.layers * one


def logit_bytes(rows: int, vocab: int) -> int:
    """Of a loss on logits that are all there: bfloat16 logits, their float32 copy, and the gradients of both."""
    return rows * vocab * (2 * BF16 + 2 * FP32)


def kv_bytes_of_token(model: Model) -> int:
    """Keys and values of one token in all layers, in bfloat16."""
    return 2 * model.layers * model.kv_width * BF16


def visual_tokens(width: int, height: int, max_pixels: int) -> int:
    """Of a picture: one for 32 x 32 pixels, after scaling it to `max_pixels` at most."""
    side = PATCH * MERGE
    scale = min(1.0, math.sqrt(max_pixels / (width * height)))
    rounded = math.floor if scale < 1 else round
    return max(1, rounded(width * scale / side)) * max(1, rounded(height * scale / side))


@dataclass(frozen=True)
class Sample:
    """The tokens of one training sample: a picture, `prompt` tokens of text, and the answer, which is supervised."""

    visual: int
    prompt: int
    answer: int

    @property
    def tokens(self) -> int:
        return self.visual + self.prompt + self.answer


def training_flops(model: Model, sample: Sample, *, checkpointing: bool, train_vision: bool) -> float:
    """Floating point operations of one sample.

    A product with a weight takes 2 operations a token, attention 4 x width x length a token and layer (half of it where
    it is causal). The backward pass takes twice the forward, and checkpointing one forward more. The head runs on
    the supervised tokens. A frozen vision tower runs forward only.
    """
    t, patches = sample.tokens, sample.visual * MERGE**2
    language = model.layers * (2 * model.layer_matrices * t + 2 * model.q_width * t * t)
    head = 2 * model.vocab * model.hidden * sample.answer
    vision = model.vision_layers * (
        2 * model.vision_matrices * patches + 4 * model.vision_hidden * patches * patches
    )
    passes = 4 if checkpointing else 3
    return passes * language + 3 * head + (passes if train_vision else 1) * vision


def decode_seconds(
    model: Model, *, answers: int, context: int, new_tokens: int, bandwidth: float, efficiency: float
) -> float:
    """Of writing `answers` answers at once on one GPU: each token reads all weights and the cache of every answer."""
    weights = BF16 * (model.language + model.vocab * model.hidden)
    cache = answers * kv_bytes_of_token(model) * (context + new_tokens / 2)
    return new_tokens * (weights + cache) / (bandwidth * efficiency)


@dataclass(frozen=True)
class Plan:
    """What the tables are for; the defaults are those of configs/stage1/base.yaml on COCO train2017 and H100 SXM."""

    gpus: int = 8
    pack: int = 8192
    pictures: int = 118_287
    objects: float = 7.3
    width: int = 640
    height: int = 480
    max_pixels: int = 786_432
    tokens_of_object: int = 25
    prompt: int = 25
    tflops: float = 989.0
    mfu: float = 0.35
    bandwidth: float = 3.35e12
    efficiency: float = 0.6
    rank: int = 32

    @property
    def sample(self) -> Sample:
        answer = 7 + round(self.objects * self.tokens_of_object)
        return Sample(visual_tokens(self.width, self.height, self.max_pixels), self.prompt, answer)


def tables(plan: Plan) -> str:
    """The tables as Markdown."""
    sample = plan.sample
    supervised = round(plan.pack * sample.answer / sample.tokens)
    gpus, pack = plan.gpus, plan.pack
    reads = f"{plan.bandwidth / 1e12:.2f} TB/s at {plan.efficiency:.0%}"
    return "\n".join(
        [
            *_table(
                ("", "parameters", "of them vision", "rows of the vocabulary", "cache of a token, KiB"),
                [
                    (
                        m.name, f"{m.parameters / 1e9:.3f} billion", f"{m.vision / 1e9:.3f}",
                        f"{m.embeddings / 1e9:.3f}{' (tied)' if m.tied else ''}", f"{kv_bytes_of_token(m) / 1024:.0f}",
                    )
                    for m in MODELS
                ],
            ),
            f"Memory of one GPU in GB, packs of {plan.pack} tokens, {supervised} of them supervised:",
            "",
            *_table(
                ("", *(m.name for m in MODELS)),
                [
                    _row("weights, gradients, Adam: 1 GPU", lambda m: state_bytes(m.parameters, gpus=1, zero=2)),
                    _row(f"the same, ZeRO-2 on {gpus}", lambda m: state_bytes(m.parameters, gpus=gpus, zero=2)),
                    _row(f"the same, ZeRO-3 on {gpus}", lambda m: state_bytes(m.parameters, gpus=gpus, zero=3)),
                    _row(f"LoRA of rank {plan.rank} instead, 1 GPU", lambda m: _lora_bytes(m, plan.rank)),
                    _row("activations, checkpointing", lambda m: activation_bytes(m, pack, checkpointing=True)),
                    _row("activations without it", lambda m: activation_bytes(m, pack, checkpointing=False)),
                    _row("logits of every token", lambda m: logit_bytes(plan.pack, m.vocab)),
                    _row("logits of supervised tokens (`head: plain`)", lambda m: logit_bytes(supervised, m.vocab)),
                    _row("the fused head: a chunk", lambda m: 512 * 2**20),
                    _row(f"**ZeRO-2 on {plan.gpus}, checkpointing, fused**", lambda m: _total(m, plan)),
                ],
            ),
            f"Time at {plan.mfu:.0%} of {plan.tflops:.0f} TFLOP/s, {plan.pictures:,} pictures of "
            f"{plan.width} x {plan.height} with {plan.objects} objects ({sample.visual} visual, {sample.prompt} prompt "
            f"and {sample.answer} answer tokens), checkpointing, vision tower frozen:",
            "",
            *_table(
                ("", *(m.name for m in MODELS)),
                [
                    ("TFLOP of a sample", *(f"{_flops(m, plan) / 1e12:.1f}" for m in MODELS)),
                    (
                        f"seconds of a step of 32 packs on {plan.gpus} GPUs",
                        *(f"{_flops(m, plan) * 32 * plan.pack / sample.tokens / _speed(plan):.1f}" for m in MODELS),
                    ),
                    (
                        "GPU hours of an epoch",
                        *(f"{_flops(m, plan) * plan.pictures / _speed(plan) * plan.gpus / 3600:.1f}" for m in MODELS),
                    ),
                    (
                        f"hours of 4 epochs on {plan.gpus} GPUs",
                        *(f"{4 * _flops(m, plan) * plan.pictures / _speed(plan) / 3600:.1f}" for m in MODELS),
                    ),
                    (
                        f"stage 2: seconds of 64 answers on one GPU ({reads})",
                        *(f"{_answers(m, plan):.1f}" for m in MODELS),
                    ),
                    (
                        "stage 2: cache of these 64 answers, GB",
                        *(f"{64 * sample.tokens * kv_bytes_of_token(m) / 1e9:.1f}" for m in MODELS),
                    ),
                ],
            ),
        ]
    )  # fmt: skip


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    lines = [head, ("---",) * len(head), *rows]
    return [*(f"| {' | '.join(line)} |" for line in lines), ""]


def _row(name: str, bytes_of: Callable[[Model], float]) -> tuple[str, ...]:
    return (name, *(f"{bytes_of(m) / 1e9:.1f}" for m in MODELS))


def _lora_bytes(model: Model, rank: int) -> float:
    return BF16 * model.parameters + state_bytes(lora_parameters(model, rank), gpus=1, zero=0)


def _total(model: Model, plan: Plan) -> float:
    states = state_bytes(model.parameters, gpus=plan.gpus, zero=2)
    return states + activation_bytes(model, plan.pack, checkpointing=True) + 512 * 2**20


def _flops(model: Model, plan: Plan) -> float:
    return training_flops(model, plan.sample, checkpointing=True, train_vision=False)


def _speed(plan: Plan) -> float:
    """Operations a second of all GPUs."""
    return plan.gpus * plan.tflops * 1e12 * plan.mfu


def _answers(model: Model, plan: Plan) -> float:
    sample = plan.sample
    return decode_seconds(
        model,
        answers=64,
        context=sample.visual + sample.prompt,
        new_tokens=sample.answer,
        bandwidth=plan.bandwidth,
        efficiency=plan.efficiency,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--write", action="store_true", help="write the tables of the defaults into the runbook"
    )
    for name, value in vars(Plan()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    given = vars(parser.parse_args())
    if not given.pop("write"):
        print(tables(Plan(**given)))
        return
    from coordexp.files import write_text

    page = PAGE.read_text(encoding="utf-8")
    before, after = page.split(START)[0], page.split(END)[1]
    write_text(PAGE, f"{before}{START}\n{tables(Plan())}{END}{after}")


if __name__ == "__main__":
    main()

"""The tables of runbooks/sizing.md, as Markdown."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from coordexp.errors import ConfigError
from coordexp.files import write_text
from scale.memory import ZERO_2, ZERO_3, fused_head_bytes, plain_head_bytes
from scale.plan import Plan, Prediction, predict, state_gb
from scale.rates import SHEETS, Rates, gpu_rates
from scale.shapes import BF16, MODELS, ModelShape, Pass, activation_bytes

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "runbooks" / "sizing.md"
CHECKED = Path(__file__).with_name("checked.json")
"""What the last whole `check` found; the page shows it."""
START, END = "<!-- tables of tools/scale_model.py -->\n", "<!-- end of tables -->\n"
SHEET = SHEETS["H100"]
GPUS = (8, 16, 64)
WAYS: dict[str, dict[str, Any]] = {
    "stage 1": {},
    "rollouts, colocate": {"stage": "rollouts", "engine": "colocate", "pack": 16_384},
    "rollouts, servers on 1 of 4": {"stage": "rollouts", "engine": "servers", "pack": 16_384},
}
RANK = 32


def tables() -> str:
    """Of the defaults, on the GPU of SHEET."""
    rates = gpu_rates(SHEET)
    parts = (_models(), _memory(Plan()), _predictions(rates), _rates(rates), _checked(CHECKED))
    return "\n".join(line for part in parts for line in part)


def write_page(page: Path = PAGE) -> None:
    """Put the tables into the page. ConfigError for a page without the two markers."""
    text = page.read_text(encoding="utf-8")
    if text.count(START) != 1 or text.count(END) != 1:
        raise ConfigError(f"{page}: expected one {START.strip()} and one {END.strip()} after it.")
    before, after = text.split(START)[0], text.split(END)[1]
    write_text(page, f"{before}{START}\n{tables()}{END}{after}")


def _models() -> list[str]:
    rows = [
        (
            m.name, f"{m.parameters / 1e9:.3f} billion", f"{m.vision / 1e9:.3f}",
            f"{m.embeddings / 1e9:.3f}{' (tied)' if m.tied else ''}", f"{m.kv_bytes() / 1024:.0f}",
        )
        for m in MODELS.values()
    ]  # fmt: skip
    return _table(
        ("", "parameters", "of them vision", "rows of the vocabulary", "cache of a token, KiB"), rows
    )


def _memory(plan: Plan) -> list[str]:
    supervised = round(plan.pack * plan.answer / (plan.visual + plan.prompt + plan.answer))
    pack = Pass(tokens=plan.pack, pairs=0, rows=supervised)

    def activations(shape: ModelShape, checkpointing: bool) -> float:
        return (
            activation_bytes(shape, pack, width=BF16, checkpointing=checkpointing, vision_trained=False) / 1e9
        )

    rows = [
        _row("weights, gradients, Adam: 1 GPU", lambda m: state_gb(m, gpus=1, zero=ZERO_2)),
        _row(f"the same, ZeRO-2 on {plan.gpus}", lambda m: state_gb(m, gpus=plan.gpus, zero=ZERO_2)),
        _row(f"the same, ZeRO-3 on {plan.gpus}", lambda m: state_gb(m, gpus=plan.gpus, zero=ZERO_3)),
        _row(f"LoRA of rank {RANK} instead, 1 GPU", lambda m: state_gb(m, gpus=1, zero=0, lora_rank=RANK)),
        _row("activations, checkpointing", lambda m: activations(m, True)),
        _row("activations without it", lambda m: activations(m, False)),
        _row("logits of every token", lambda m: plain_head_bytes(plan.pack, m.vocab) / 1e9),
        _row(
            "logits of supervised tokens (`head: plain`)",
            lambda m: plain_head_bytes(supervised, m.vocab) / 1e9,
        ),
        _row("the fused head", lambda m: fused_head_bytes(m, supervised) / 1e9),
    ]
    title = (
        f"Memory of one GPU in GB, packs of {plan.pack} tokens, {supervised} supervised, vision tower frozen:"
    )
    return [title, "", *_table(("", *MODELS), rows)]


def _predictions(rates: Rates) -> list[str]:
    rows = [
        prediction_row(name, predict(_plan(model, gpus, ways), rates))
        for model in MODELS
        for gpus in GPUS
        for name, ways in WAYS.items()
    ]
    plan = Plan()
    title = (
        f"Predicted for {SHEET.name} of {SHEET.memory_gb:.0f} GB: stage 1 on {plan.packs_a_step} packs of {plan.pack} "
        f"tokens a step, rollouts on {plan.samples_a_step} pictures a step, answers of {plan.answer} tokens, packs "
        f"of 16384; pictures of {plan.width} x {plan.height} with {plan.objects} objects ({plan.visual} visual, "
        f"{plan.prompt} prompt and {plan.answer} answer tokens), bfloat16, checkpointing, fused head, flash attention, "
        "vision tower frozen; ZeRO-2, for 32B ZeRO-3:"
    )
    head = (
        "model",
        "GPUs",
        "what",
        "GB of a GPU",
        "seconds of a step",
        "GPU hours of 10,000 pictures",
        "where they go",
    )
    return [title, "", *_table(head, rows)]


def _plan(model: str, gpus: int, ways: dict[str, Any]) -> Plan:
    servers = gpus // 4 if ways.get("engine") == "servers" else 0
    return Plan(model=model, gpus=gpus, zero=ZERO_3 if model == "32B" else ZERO_2, servers=servers, **ways)


def prediction_row(name: str, found: Prediction) -> tuple[str, ...]:
    """One line of the table."""
    gigabytes = found.peak / 1e9
    room = "" if gigabytes <= 0.9 * SHEET.memory_gb else " (too much)"
    return (
        found.plan.model, str(found.plan.gpus), name, f"{gigabytes:.1f}{room}", f"{found.time.total:.2f}",
        f"{found.hours_of_10k:.2f}", where_it_goes(found),
    )  # fmt: skip


def where_it_goes(found: Prediction, *, least: float = 0.03) -> str:
    """Parts of the step by share, the largest first; small ones left out."""
    shares = {name: seconds / found.time.total for name, seconds in found.time.parts().items()}
    ordered = sorted(shares.items(), key=lambda item: -item[1])
    return ", ".join(f"{name} {share:.0%}" for name, share in ordered if share >= least)


def _rates(rates: Rates) -> list[str]:
    rows = [
        (one.name, shown_rate(one.name, float(getattr(rates, one.name))), rates.sources.get(one.name, ""))
        for one in fields(rates)
        if one.type == "float" and getattr(rates, one.name) not in (0.0, float("inf"))
    ]
    return [
        "The rates behind it, each with its source; none of them is measured:",
        "",
        *_table(("rate", "", "source"), rows),
    ]


def shown_rate(name: str, value: float) -> str:
    """With its unit."""
    if name.endswith("_s"):
        return f"{value * 1e6:.3g} µs" if value < 1e-3 else f"{value * 1e3:.3g} ms"
    unit = {"products": "operations", "attention": "operations", "scores": "logits"}.get(name, "bytes")
    power, prefix = next(
        (p, w) for p, w in ((12, "tera"), (9, "giga"), (6, "mega"), (0, "")) if value >= 10**p or p == 0
    )
    return f"{value / 10**power:.3g} {prefix}{unit}/s"


def _checked(path: Path) -> list[str]:
    found = json.loads(path.read_text(encoding="utf-8"))
    rows = [
        (
            row["name"],
            row["what"],
            _digits(row, "predicted"),
            _digits(row, "measured"),
            f"{row['error']:+.1%}",
        )
        for row in found["rows"]
    ]
    title = (
        f"The same formulas on real runs of tiny models on a CPU, rates fitted to {found['calibration']} other runs "
        f"({found['machine']}; {found['load']}; {found['date']}):"
    )
    return [title, "", *_table(("run", "", "predicted", "measured", "error"), rows)]


def _digits(row: dict[str, Any], key: str) -> str:
    return f"{row[key]:.3f}" if row["unit"] == "s" else f"{row[key]:.1f}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [head, ("---",) * len(head), *rows]
    return [*(f"| {' | '.join(line)} |" for line in lines), ""]


def _row(name: str, gigabytes: Callable[[ModelShape], float]) -> tuple[str, ...]:
    return (name, *(f"{gigabytes(m):.1f}" for m in MODELS.values()))

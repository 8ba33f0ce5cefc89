"""The model card: what Hugging Face reads (a YAML block with the model's results) and what people read.

    facts = gather(Path("runs/stage1"))
    write_card(facts, Path("runs/stage1/README.md"))

Everything in it is taken from the files of the run. What is not there is left out.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
import yaml
from huggingface_hub import EvalResult, ModelCardData

from coordexp.config.run.resolved import flat_of_resolved, is_run_context
from coordexp.config.schema.custom import RLHF
from coordexp.config.schema.prompt import Prompt
from coordexp.files import write_text
from coordexp.handover.facts import CardEvaluation, CardFacts
from coordexp.shipped import PLUGIN_FILE

CARD = "README.md"
TASK = "object-detection"
METRICS = {
    "AP": "COCO AP (0.5:0.95)",
    "AP50": "COCO AP at 0.5",
    "AP75": "COCO AP at 0.75",
    "AP_const": "COCO AP (0.5:0.95), all scores 1",
    "f1_at_50": "F1 at IoU 0.5",
    "precision_at_50": "precision at IoU 0.5",
    "recall_at_50": "recall at IoU 0.5",
    "f1_50_95": "F1 averaged over IoU 0.5:0.95",
}
"""Of metrics.json -> how the card names it; -1, for none there, is left out."""
_TEMPLATE = Path(__file__).parent / "templates" / "card.md.jinja"
_SECTIONS = ("custom", "training", "stage2_ab", "rollout_matching")


def write_card(facts: CardFacts, path: Path, *, pictures: tuple[str, ...] = ()) -> None:
    """Write the card. pictures: paths relative to its folder."""
    write_text(path, render_card(facts, pictures=pictures))


def render_card(facts: CardFacts, *, pictures: tuple[str, ...] = ()) -> str:
    """The whole card, YAML block included."""
    template = jinja2.Environment(
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    ).from_string(_TEMPLATE.read_text(encoding="utf-8"))  # fmt: skip
    prompt = facts.prompt or Prompt()
    return template.render(
        metadata=str(card_data(facts)),
        facts=facts,
        metrics=METRICS,
        recipe=recipe_of(facts.resolved) if facts.resolved else None,
        command=_command(facts.resolved) if facts.resolved else None,
        extent=_extent((facts.resolved or {}).get("derived", {})),
        versions=((facts.resolved or {}).get("context") or {}).get("versions", {}),
        prompt=prompt,
        content=_content(prompt),
        python=repr,
        pictures=pictures,
    )


def card_data(facts: CardFacts) -> ModelCardData:
    """The YAML block, as huggingface_hub makes it."""
    base = (facts.resolved or {}).get("swift", {}).get("model")
    return ModelCardData(
        base_model=base if _is_hub_id(base) else None,
        library_name="transformers" if facts.is_plain else "peft",
        pipeline_tag="image-text-to-text",
        tags=["coordexp", TASK, "coordinate-tokens", "qwen3_vl"],
        model_name=facts.name,
        eval_results=eval_results(facts) or None,
        ignore_metadata_errors=False,
    )


def eval_results(facts: CardFacts) -> list[EvalResult]:
    """One entry for each number of each evaluation."""
    return [
        EvalResult(
            task_type=TASK,
            dataset_type=one.dataset,
            dataset_name=f"{one.dataset} ({one.num_images} images)",
            metric_type=name,
            metric_name=METRICS[name],
            metric_value=value,
        )
        for one in facts.evaluations
        for name, value in shown_metrics(one).items()
    ]


def shown_metrics(evaluation: CardEvaluation) -> dict[str, float]:
    """The numbers of `METRICS` that the evaluation has."""
    found = {name: evaluation.metrics.get(name) for name in METRICS}
    return {name: float(value) for name, value in found.items() if value is not None and value >= 0}


def recipe_of(resolved: Mapping[str, Any]) -> str:
    """The effective configuration, what is at its default left out, as a run file that `coordexp train` takes."""
    from coordexp.config.checks.swift_arguments import all_arguments

    is_rlhf = resolved["trainer_variant"] == RLHF
    arguments = all_arguments(rlhf=is_rlhf)
    flat = flat_of_resolved(resolved, _SECTIONS)
    if is_rlhf:  # rlhf_type says what trains
        del flat["custom_trainer_variant"]
    kept = {
        name: value
        for name, value in flat.items()
        if name not in arguments
        or (value != arguments[name].default and (not is_run_context(name) or name in ("output_dir", "seed")))
    }
    return yaml.safe_dump(kept, allow_unicode=True, sort_keys=False, width=110)


def _extent(derived: Mapping[str, Any]) -> str:
    """How long was trained, in words."""
    steps, samples = (derived.get(name) for name in ("total_steps", "effective_batch_size"))
    ranks = derived.get("world_size") or 1
    length = f"{steps} steps" if steps else "steps by epochs"
    size = f" of {samples} samples" if samples else ""
    return f"{length}{size} on {ranks} rank{'s' if ranks > 1 else ''}"


def _command(resolved: Mapping[str, Any]) -> str | None:
    """The command of the run, without the places of this machine that it names programs and plugins by."""
    written = (resolved.get("context") or {}).get("command")
    if not written:
        return None
    words = shlex.split(written)
    program = ["swift", Path(words[0]).stem] if words[0].endswith(".py") else [Path(words[0]).name]
    return shlex.join(
        "coordexp/plugin.py" if word == str(PLUGIN_FILE) or word.endswith("/coordexp/plugin.py") else word
        for word in [*program, *words[1:]]
    )


def _content(prompt: Prompt) -> str:
    """The user's message for transformers, as Python."""
    image, text = (
        '{"type": "image", "image": image}',
        f'{{"type": "text", "text": {json.dumps(prompt.user)}}}',
    )
    return ", ".join([image, text] if prompt.media_order == "media_first" else [text, image])


def _is_hub_id(name: object) -> bool:
    return (
        isinstance(name, str)
        and name.count("/") == 1
        and not name.startswith((".", "/", "~"))
        and not Path(name).parent.exists()
    )

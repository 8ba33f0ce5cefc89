"""Show what one record, or one rollout of it, is trained on: every token with its role, type and weight.

    python tools/inspect_sample.py data/train.jsonl:12
    python tools/inspect_sample.py data/train.jsonl:12 --rollout '{"objects": [{"desc": "cat", ...' --model DIR

Prints the sample in colour and writes the same as a page of its own (hover over a token for its numbers).
Without --model, text is encoded with the tokenizer of the tiny demo model. A checkpoint is asked as it was trained
(coordexp_prompt.json), unless a flag says otherwise. Image placeholders are shown as one token each; a model's
processor expands them.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from coordexp.codec.forms.choose import FORMS, form_of
from coordexp.codec.parse import ParsedRollout
from coordexp.codec.pieces import pieces_of
from coordexp.codec.records import OBJECT_ORDERINGS, Record, order_objects, parse_record
from coordexp.codec.schema import FIELD_ORDERS
from coordexp.codec.token_types import TokenType
from coordexp.config.checks.problems import COMMAND_LINE, raise_problems
from coordexp.config.checks.validation import validate
from coordexp.config.checks.yaml_tree import Tree
from coordexp.config.prompt import PromptRecord, describe, find_prompt, settle, system_text
from coordexp.config.schema.pipeline import TokenCeConfig
from coordexp.config.schema.prompt import IMAGE_TAG, Prompt
from coordexp.errors import ConfigError, CoordExpError, RecordError
from coordexp.files import write_text
from coordexp.losses.modules import ForwardKind, TokenCE
from coordexp.matching import MatchResult, match_objects
from coordexp.targets import DroppedSample, EncodedSample, TargetBuilder, TokenRole
from coordexp.targets.rows import ce_weights
from coordexp.telemetry.token_page import ROLE_COLORS, PageToken, render_token_page

FLAGS = {
    "user": "prompt",
    "system": "system",
    "media_order": "media_order",
    "answer_form": "answer_form",
    "object_field_order": "field_order",
    "object_ordering": "object_ordering",
}
"""Name in `Prompt` -> flag."""


@dataclass(frozen=True)
class TokenView:
    """One token as it is shown.

    text: a character of several tokens stands with the last of them, the others have none.
    true_bin: of a supervised coordinate slot, else None.
    """

    index: int
    token_id: int
    text: str
    role: TokenRole
    type: TokenType
    weight: float
    true_bin: int | None

    @property
    def is_supervised(self) -> bool:
        """Whether any loss looks at it."""
        return self.weight > 0 or self.true_bin is not None

    @property
    def note(self) -> str:
        """The number beside it: a true bin, or a weight that is neither 0 nor 1."""
        if self.true_bin is not None:
            return str(self.true_bin)
        return f"{self.weight:g}" if self.weight not in (0.0, 1.0) else ""

    @property
    def on_page(self) -> PageToken:
        """The token for the page, with all about it in its tooltip."""
        taught = "" if self.true_bin is None else f" · true bin {self.true_bin}"
        role, kind = label(self.role), self.type.name.lower()
        part = "" if self.text else " · part of a character"
        tooltip = f"token {self.index} · id {self.token_id} · {role} · {kind} · weight {self.weight:g}{taught}{part}"
        return PageToken(self.text, role, kind, self.is_supervised, self.note, tooltip)


def main(argv: Sequence[str] | None = None, console: Console | None = None) -> int:
    """Run the tool; 0 done, 2 bad input, 1 failure (the sample would be dropped)."""
    args = build_parser().parse_args(argv)
    console = console or Console(highlight=False)
    try:
        record = read_record(args.record)
        tok = load_tokenizer(args.model)
        token_ce = token_ce_of(args)
        prompt, asked = prompt_of(args)
        sample, facts, forward = build_sample(record, tok, args, prompt)
        facts = [asked, *facts]
        views, slots = list(token_views(sample, tok, token_ce, forward)), slot_rows(sample, tok)
        show(console, args.record, facts, views, slots)
        page = args.html or Path("runs/inspect") / f"{Path(record.file or 'record').stem}_{record.line}.html"
        write_page(page, args.record, facts, views, slots)
    except CoordExpError as error:
        print(f"inspect_sample: {error}", file=sys.stderr)
        return error.exit_code
    console.print(f"\nThe same as a page: {page}", soft_wrap=True)
    return 0


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="inspect_sample", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("record", metavar="FILE.jsonl:LINE", help="a line (from 1) of a data file")
    parser.add_argument("--rollout", metavar="TEXT", help="what the model answered; - reads it from stdin")
    parser.add_argument("--model", type=Path, help="folder of a model or tokenizer with coordinate tokens")
    parser.add_argument("--html", type=Path, help="page to write (default: runs/inspect/FILE_LINE.html)")
    parser.add_argument("--prompt", help="what the model is asked")
    parser.add_argument("--system", help="system message, or a .txt file; '' for none")
    parser.add_argument("--media-order", choices=("media_first", "text_first"))
    parser.add_argument("--answer-form", choices=FORMS, help="how answers are written")
    parser.add_argument("--field-order", choices=FIELD_ORDERS)
    parser.add_argument("--object-ordering", choices=OBJECT_ORDERINGS)
    weights = parser.add_argument_group("token_ce weights")
    weights.add_argument("--desc-weight", type=float, default=1.0, help="descriptions of ground truth")
    weights.add_argument("--fn-desc-weight", type=float, default=1.0, help="descriptions of missed objects")
    weights.add_argument("--matched-struct-weight", type=float, default=1.0, help="structure of matches")
    weights.add_argument("--drop-invalid-multiplier", type=float, default=1.0)
    return parser


def read_record(place: str) -> Record:
    """The record at FILE:LINE; RecordError with what is wrong with the place or the record."""
    file, separator, number = place.rpartition(":")
    if not separator or not number.isdecimal() or int(number) < 1:
        raise RecordError(f"{place!r}: expected FILE.jsonl:LINE with a line number from 1, as train.jsonl:12")
    line = int(number)
    try:
        with open(file, encoding="utf-8-sig") as stream:
            lines = stream.read().split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise RecordError(f"{file}: cannot be read ({error}). Check the path of the data file") from error
    num_lines = len(lines) - (lines[-1] == "")
    if line > num_lines:
        raise RecordError(f"{file} has {num_lines} lines, there is no line {line}")
    if not lines[line - 1].strip():
        raise RecordError(f"{file}:{line} is blank; give the line of a record")
    return parse_record(lines[line - 1], file=file, line=line)


def load_tokenizer(model: Path | None) -> Any:
    """The tokenizer in a folder, or the tiny model's. ConfigError when the folder holds none."""
    if model is None:
        from coordexp.models.tiny_tokenizer import train_tiny_tokenizer

        return train_tiny_tokenizer()
    if not (model / "tokenizer_config.json").is_file():
        raise ConfigError(
            f"{model}: no tokenizer_config.json there; expected the folder of a model or tokenizer"
        )
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model)


def token_ce_of(args: argparse.Namespace) -> TokenCE:
    """The weights given by flags; ConfigError for one out of range."""
    weights = {
        "desc_ce_weight": args.desc_weight,
        "self_context_struct_ce_weight": 0.0,
        "rollout_fn_desc_weight": args.fn_desc_weight,
        "rollout_matched_prefix_struct_weight": args.matched_struct_weight,
        "rollout_drop_invalid_struct_ce_multiplier": args.drop_invalid_multiplier,
    }
    _, problems = validate(TokenCeConfig, Tree(weights, {(): COMMAND_LINE}))
    raise_problems(problems)
    return TokenCE(**weights)


def prompt_of(args: argparse.Namespace) -> tuple[Prompt, str]:
    """How the model is asked: by flags, else as it was trained; and a line that says which."""
    given = {name: getattr(args, flag) for name, flag in FLAGS.items() if getattr(args, flag) is not None}
    if "system" in given:
        given["system"] = system_text(given["system"])
    record = None if args.model is None else find_prompt(folders_of(args.model))
    prompt, differences = settle(record, given)
    return prompt, said_of(
        record, describe(differences, {n: f"--{f}".replace("_", "-") for n, f in FLAGS.items()})
    )


def folders_of(model: Path) -> list[str | Path]:
    """Where a prompt may lie: the folder, and for an adapter that of its base model."""
    from coordexp.models.merge_offset import base_model, is_adapter

    return [model, base_model(model)] if is_adapter(model) else [model]


def said_of(record: PromptRecord | None, differences: str) -> str:
    """A line about where the prompt comes from."""
    if record is None:
        return "prompt: by flags and defaults; no folder says how the model was trained"
    return f"prompt: as trained ({record.path})" + (f", but{differences}" if differences else "")


def chat_messages(prompt: Prompt, num_images: int) -> list[dict[str, Any]]:
    """The conversation in the form of chat templates."""
    messages = []
    for message in prompt.messages(num_images):
        texts = message["content"].split(IMAGE_TAG)
        parts = [[{"type": "text", "text": text}] if text else [] for text in texts]
        content = [part for before in parts[:-1] for part in [*before, {"type": "image"}]] + parts[-1]
        messages.append({"role": message["role"], "content": content})
    return messages


def build_sample(
    record: Record, tok: Any, args: argparse.Namespace, prompt: Prompt
) -> tuple[EncodedSample, list[str], ForwardKind]:
    """The sample, facts to print above it, and the forward whose weights apply."""
    form = form_of(prompt.answer_form, prompt.object_field_order)
    objects = order_objects(record.objects, prompt.object_ordering)
    text = tok.apply_chat_template(
        chat_messages(prompt, len(record.images)), add_generation_prompt=True, tokenize=False
    )
    prompt_ids = tok.encode(text, add_special_tokens=False)
    builder = TargetBuilder(tok, form=form)
    if args.rollout is None:
        sample = builder.from_ground_truth(prompt_ids, objects, sample_id=args.record)
        return sample, [f"ground truth: {len(objects)} objects"], ForwardKind.TEACHER_FORCED
    text = sys.stdin.read() if args.rollout == "-" else args.rollout
    parsed = form.parse(tok.encode(text, add_special_tokens=False), tok)
    match = match_objects(parsed.objects, objects)
    found = builder.from_rollout(
        prompt_ids, parsed, match, objects, generation_prompt_ids=prompt_ids, sample_id=args.record
    )
    if isinstance(found, DroppedSample):
        raise CoordExpError(f"{args.record}: the sample would be dropped ({found.reason}): {found.detail}")
    return found, rollout_facts(parsed, match, len(objects)), ForwardKind.ROLLOUT


def rollout_facts(parsed: ParsedRollout, match: MatchResult, num_gts: int) -> list[str]:
    """What parsing and matching found, one line each."""
    flags = [name for name in ("invalid_rollout", "leading_text", "truncated") if getattr(parsed, name)]
    dropped = ", ".join(f"{count} {reason}" for reason, count in parsed.dropped_by_reason.items())
    facts = [f"rollout: {len(parsed.objects)} objects kept; dropped: {dropped or 'none'}"]
    facts += [f"rollout is {', '.join(flags)}"] if flags else []
    facts += (
        [f"the prefix is the empty container: all {num_gts} are missed"] if parsed.prefix_is_fallback else []
    )
    pairs = [
        f"{parsed.objects[p].desc!r} is object {g} (IoU {iou:.2f})"
        for (p, g), iou in zip(match.matched, match.maskious, strict=True)
    ]
    facts.append(f"matched {len(pairs)} of {num_gts}" + (f": {'; '.join(pairs)}" if pairs else ""))
    return facts


def token_views(
    sample: EncodedSample, tok: Any, token_ce: TokenCE, forward: ForwardKind
) -> Iterator[TokenView]:
    """Every token of the sample."""
    pieces = pieces_of(tok)
    ids, weights = sample.token_ids_T.tolist(), ce_weights(sample, token_ce, forward).tolist()
    true_bins = {at: true_bin for slot in taught_slots(sample) for at, true_bin in zip(*slot, strict=True)}
    for index, (token_id, text) in enumerate(zip(ids, pieces.texts(ids), strict=True)):
        text = text if pieces[token_id] else f"(no text: id {token_id})"
        role, token_type = TokenRole(sample.roles_T[index]), TokenType(sample.types_T[index])
        yield TokenView(index, token_id, text, role, token_type, weights[index], true_bins.get(index))


def taught_slots(sample: EncodedSample) -> list[tuple[list[int], list[int]]]:
    """Tokens and true bins of each box; in ground truth also of the polygons, all their vertices as one.

    The objective on rollouts has no loss on vertices, so there polygons are not shown as taught.
    """
    slots = list(zip(sample.box_positions_B4.tolist(), sample.box_bins_B4.tolist(), strict=True))
    if len(sample.poly_positions_N) and (sample.roles_T == TokenRole.GROUND_TRUTH).any():
        slots.append((sample.poly_positions_N.tolist(), sample.poly_bins_N.tolist()))
    return slots


def slot_rows(sample: EncodedSample, tok: Any) -> list[dict[str, str]]:
    """One row per slot: where it is, what part of the sample, bins as written, bins as taught."""
    if sample.coords_are_text:
        return []
    bin_of = pieces_of(tok).coord_vocab.bin_of
    return [
        {
            "tokens": f"{positions[0]}-{positions[-1]}",
            "role": label(TokenRole(sample.roles_T[positions[0]])),
            "written": " ".join(str(bin_of(int(sample.token_ids_T[at]))) for at in positions),
            "taught": " ".join(map(str, bins)),
        }
        for positions, bins in taught_slots(sample)
    ]


def show(
    console: Console, title: str, facts: list[str], views: list[TokenView], slots: list[dict[str, str]]
) -> None:
    """Print one line per run of tokens with equal role and weight, then the slots."""
    console.print(Text(title, style="bold"))
    for fact in facts:
        console.print(Text(f"  {fact}", style="dim"), soft_wrap=True)
    table = Table(box=None, pad_edge=False)
    table.add_column("tokens", justify="right", style="dim", no_wrap=True)
    table.add_column("part", no_wrap=True)
    table.add_column("weight", justify="right", no_wrap=True)
    table.add_column("text (| between tokens, ->N: taught bin N)", overflow="fold")
    for (role, weight), group in groupby(_with_run_weight(views), key=lambda pair: (pair[0].role, pair[1])):
        run = [view for view, _ in group]
        place = f"{run[0].index}-{run[-1].index}" if len(run) > 1 else str(run[0].index)
        part = Text(label(role), style=f"black on {ROLE_COLORS[label(role)]}")
        table.add_row(place, part, f"{weight:g}", Text("|", style="dim").join(map(_styled, run)))
    console.print(table)
    if slots:
        slot_table = Table(
            "tokens", "part", "written", "taught", title="supervised slots", title_justify="left"
        )
        for slot in slots:
            slot_table.add_row(*slot.values())
        console.print(slot_table)


def write_page(
    path: Path, title: str, facts: list[str], views: list[TokenView], slots: list[dict[str, str]]
) -> None:
    """Write the page: one file without links to anything else."""
    page = render_token_page(title, facts, [view.on_page for view in views], slots)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, page)


def label(role: TokenRole) -> str:
    """A role in words."""
    return role.name.lower().replace("_", " ")


def _with_run_weight(views: list[TokenView]) -> Iterator[tuple[TokenView, float]]:
    """Coordinates have no weight of their own; they stay in the run of the text around them."""
    weight = 0.0
    for view in views:
        if view.type is not TokenType.COORD:
            weight = view.weight
        yield view, weight


def _styled(view: TokenView) -> Text:
    style = {
        TokenType.DESC: "italic cyan",
        TokenType.COORD: "bold magenta",
        TokenType.EOS: "bold yellow",
    }.get(view.type, "")
    text = Text(view.text.replace("\n", "\\n"), style=style if view.is_supervised else f"{style} dim".strip())
    if view.true_bin is not None:
        text.append(f"->{view.true_bin}", style="green")
    return text


if __name__ == "__main__":
    sys.exit(main())

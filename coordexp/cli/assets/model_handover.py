"""`coordexp model card` and `coordexp model export`: give a trained model to others."""

from __future__ import annotations

import argparse
from pathlib import Path

from coordexp.cli.arguments import count
from coordexp.errors import EXIT_OK


def add_card_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register `model card`."""
    parser = commands.add_parser(
        "card",
        help="write the model card of a run",
        description="Write a README.md that Hugging Face reads: results of `coordexp eval`, data, effective "
        "configuration, checksums of the weights, how to use it. Of a run folder its best checkpoint is described, or "
        "the last whole one.",
    )
    parser.add_argument("source", type=Path, metavar="RUN", help="run folder, or a checkpoint in it")
    parser.add_argument("--out", type=Path, metavar="FILE", help="default: README.md in RUN")
    _add_facts(parser)


def add_export_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register `model export`."""
    parser = commands.add_parser(
        "export",
        help="write one folder that transformers, vLLM and CoordExp load alike",
        description="Write a checkpoint as a whole model: LoRA and offsets merged, tokenizer, processor, chat "
        "template, greedy generation settings, prompt and model card.",
    )
    parser.add_argument(
        "source",
        type=Path,
        metavar="SRC",
        help="run folder (its best checkpoint, or the last), or a checkpoint",
    )
    parser.add_argument("--merge", action="store_true", help="fold adapters in; needed where there are any")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="new or empty folder")
    parser.add_argument("--base", help="base model of a LoRA checkpoint (default: the one it names)")
    _add_facts(parser)


def _add_facts(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--eval", type=Path, nargs="+", default=[], metavar="DIR", dest="evaluations",
        help="folders of `coordexp eval` for the results (default: those in the run folder, of this checkpoint)",
    )  # fmt: skip
    parser.add_argument("--name", help="of the model (default: that of the run folder)")
    parser.add_argument(
        "--pictures", type=count, default=0, metavar="N",
        help="draw so many images of the first evaluation, ground truth beside the answer (default 0)",
    )  # fmt: skip


def run_card(args: argparse.Namespace) -> int:
    """Write the card; returns the process exit code."""
    from coordexp.handover.card import CARD, write_card
    from coordexp.handover.facts import gather
    from coordexp.handover.pictures import draw_answers
    from coordexp.inference.fingerprint import model_fingerprint

    facts = gather(
        args.source, fingerprint=model_fingerprint, evaluations=tuple(args.evaluations), name=args.name
    )
    path = args.out or args.source / CARD
    pictures = draw_answers(facts.evaluations[:1], path.parent, args.pictures)
    write_card(facts, path, pictures=pictures)
    print(f"wrote {path} (of {facts.checkpoint}, {len(facts.evaluations)} evaluations)")
    return EXIT_OK


def run_export(args: argparse.Namespace) -> int:
    """Write the folder; returns the process exit code."""
    from coordexp.handover.card import CARD, write_card
    from coordexp.handover.facts import gather, locate
    from coordexp.handover.pictures import draw_answers
    from coordexp.inference.fingerprint import model_fingerprint
    from coordexp.models.export import export_model

    def add_card(folder: Path) -> None:
        facts = gather(
            args.source,
            fingerprint=model_fingerprint,
            evaluations=tuple(args.evaluations),
            weights_in=folder,
            name=args.name,
        )
        write_card(facts, folder / CARD, pictures=draw_answers(facts.evaluations[:1], folder, args.pictures))

    _, checkpoint = locate(args.source)
    unties = export_model(checkpoint, args.out, merge=args.merge, base=args.base, add=add_card)
    note = "; embedding and head are two matrices now (tie_word_embeddings: false)" if unties else ""
    print(f"wrote {args.out} (of {checkpoint}){note}")
    return EXIT_OK

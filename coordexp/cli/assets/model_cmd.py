"""`coordexp model ...`: make the tiny model, give one its coordinate tokens, merge adapters, hand it over."""

from __future__ import annotations

import argparse
from pathlib import Path

from coordexp.cli.assets.model_handover import add_card_parser, add_export_parser, run_card, run_export
from coordexp.cli.assets.model_prefix import add_prefix_parser, run_export_prefix
from coordexp.errors import EXIT_OK, ConfigError


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register `model` and its subcommands."""
    parser = subparsers.add_parser(
        "model",
        help="make a tiny model, add coordinate tokens, merge adapters, write card and folder to hand over",
    )
    commands = parser.add_subparsers(dest="model_command", metavar="COMMAND", required=True)
    _add_tiny_parser(commands)
    _add_coord_tokens_parser(commands)
    _add_latent_tokens_parser(commands)
    _add_merge_parser(commands)
    add_export_parser(commands)
    add_prefix_parser(commands)
    add_card_parser(commands)


def run(args: argparse.Namespace) -> int:
    """Run the chosen `model` subcommand; returns the process exit code."""
    commands = {
        "tiny": _run_tiny,
        "add-coord-tokens": _run_add_coord_tokens,
        "add-latent-tokens": _run_add_latent_tokens,
        "merge": _run_merge,
        "merge-offset": _run_merge,
        "export": run_export,
        "export-prefix": run_export_prefix,
        "card": run_card,
    }
    return commands[args.model_command](args)


def _add_tiny_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "tiny",
        help="a randomly initialised Qwen3-VL with its own tokenizer",
        description="Write a small random Qwen3-VL that loads like a hub checkpoint. `demo` (2.8M "
        "parameters) learns synthetic 64 px scenes; `nano` (0.1M) is for tests; `real-vocab` (10M) has Qwen's own "
        "vocabulary and image sizes (it needs the package dashscope).",
    )
    parser.add_argument("--output", type=Path, required=True, help="directory to create")
    parser.add_argument("--preset", choices=("demo", "nano", "real-vocab"), default="demo")
    parser.add_argument("--seed", type=int, default=0, help="of the random weights (default 0)")
    parser.add_argument("--corpus", type=Path, help="text file to train the tokenizer on, one text a line")
    parser.add_argument("--no-coord-tokens", action="store_true", help="leave the coordinate tokens out")
    parser.add_argument("--force", action="store_true", help="replace a tiny model made from other arguments")


def _add_coord_tokens_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "add-coord-tokens",
        help="add the 1000 coordinate tokens to a checkpoint",
        description="Copy a checkpoint, add the coordinate tokens its tokenizer lacks and grow its "
        "embeddings. Existing rows keep their values and the padded matrix never shrinks.",
    )
    _add_expansion_arguments(parser)


def _add_latent_tokens_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "add-latent-tokens",
        help="add tokens that hold the places of a latent prefix to a checkpoint",
        description="Copy a checkpoint and add <|latent_0|>, <|latent_1|>, ... to it, which stand where the prompt's "
        "text stood when a latent prefix is trained (trainer variant latent_prefix). Existing rows keep their values; "
        "rows that the padded matrix has to spare are used before it grows.",
    )
    parser.add_argument("--num", type=int, default=16, metavar="M", help="how many tokens (default 16)")
    _add_expansion_arguments(parser)


def _add_expansion_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", type=Path, required=True, help="checkpoint directory to read")
    parser.add_argument("--output", type=Path, required=True, help="directory to create")
    parser.add_argument("--seed", type=int, default=0, help="of the noise on the new rows (default 0)")
    parser.add_argument("--pad-to-multiple-of", type=int, default=64, metavar="N", help="default 64")


def _add_merge_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "merge",
        aliases=["merge-offset"],
        help="fold LoRA weights and offsets of the coordinate tokens into the model",
        description="Write a checkpoint of a run with LoRA, with custom.coord_offset.enabled or with both as a plain "
        "model, which every tool loads and whose logits are the same.",
    )
    parser.add_argument("--model", type=Path, required=True, help="checkpoint directory to read")
    parser.add_argument("--output", type=Path, required=True, help="directory to create")
    parser.add_argument("--base", help="base model of a LoRA checkpoint (default: the one it names)")


def _run_tiny(args: argparse.Namespace) -> int:
    corpus = None if args.corpus is None else _read_lines(args.corpus)
    from coordexp.models.tiny import build_tiny_model

    written = build_tiny_model(
        args.output,
        preset=args.preset,
        seed=args.seed,
        corpus=corpus,
        coord_tokens=not args.no_coord_tokens,
        force=args.force,
    )
    print(f"{'wrote' if written else 'up to date:'} tiny Qwen3-VL ({args.preset}) in {args.output}")
    return EXIT_OK


def _run_add_coord_tokens(args: argparse.Namespace) -> int:
    from coordexp.models.coord_tokens import add_coord_tokens

    num_added, written = add_coord_tokens(
        args.model, args.output, seed=args.seed, pad_to_multiple_of=args.pad_to_multiple_of
    )
    if not num_added:
        print(f"nothing to do: {args.model} already holds all coordinate tokens; use it as it is")
    elif written:
        print(f"added {num_added} coordinate tokens; wrote {args.output}")
    else:
        print(f"up to date: {args.output}")
    return EXIT_OK


def _run_add_latent_tokens(args: argparse.Namespace) -> int:
    from coordexp.models.latent_prefix.vocabulary import add_latent_tokens

    num_added, written = add_latent_tokens(
        args.model, args.output, args.num, seed=args.seed, pad_to_multiple_of=args.pad_to_multiple_of
    )
    if not num_added:
        print(f"nothing to do: {args.model} already holds {args.num} latent tokens; use it as it is")
    elif written:
        print(f"added {num_added} latent tokens; wrote {args.output}")
    else:
        print(f"up to date: {args.output}")
    return EXIT_OK


def _run_merge(args: argparse.Namespace) -> int:
    from coordexp.models.merge_offset import merge_offset

    unties = merge_offset(args.model, args.output, base=args.base)
    note = "; embedding and head are two matrices now (tie_word_embeddings: false)" if unties else ""
    print(f"wrote {args.output}{note}")
    return EXIT_OK


def _read_lines(path: Path) -> list[str]:
    if not path.is_file():
        raise ConfigError(f"--corpus {path}: no such file.")
    return path.read_text(encoding="utf-8").splitlines()

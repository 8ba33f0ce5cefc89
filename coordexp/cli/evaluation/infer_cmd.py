"""`coordexp infer`: a checkpoint and a JSONL file in, predictions and their token trace out."""

from __future__ import annotations

import argparse
from contextlib import closing
from pathlib import Path

from coordexp.cli.arguments import count, positive_int
from coordexp.errors import EXIT_OK


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register `infer`."""
    parser = subparsers.add_parser(
        "infer",
        help="write a checkpoint's detections for a JSONL file",
        description="The same command again goes on where a stopped run was.",
    )
    parser.add_argument("--model", type=Path, required=True, help="checkpoint folder")
    parser.add_argument("--data", type=Path, required=True, help="JSONL file with images and ground truth")
    parser.add_argument(
        "--output", type=Path, required=True, help="folder for gt_vs_pred.jsonl and the token trace"
    )
    parser.add_argument("--overwrite", action="store_true", help="start anew whatever the folder holds")
    parser.add_argument("--limit", type=positive_int, help="only the first N images")
    parser.add_argument("--batch-size", type=positive_int, default=16, help="answers at a time (default 16)")
    parser.add_argument(
        "--max-new-tokens",
        type=positive_int,
        help="of an answer (default: half as many again as the longest ground truth has, at least 1024)",
    )
    parser.add_argument(
        "--coord",
        choices=("argmax", "median", "expectation"),
        help="how a coordinate is read from its distribution: the most likely bin, or the median or mean (default "
        "median; argmax where coordinates are numbers or a server answers)",
    )
    parser.add_argument("--temperature", type=float, default=0.0, help="of sampling (default 0: greedy)")
    parser.add_argument("--seed", type=count, default=0, help="of sampled answers (default 0)")
    parser.add_argument("--repetition-penalty", type=float, default=1.0, help="default 1: none")
    parser.add_argument(
        "--guided", action="store_true",
        help="only whole answers in the checkpoint's form can be written, with the corners of boxes in their order",
    )  # fmt: skip
    parser.add_argument(
        "--guided-max-objects", type=positive_int, metavar="N", help="objects of a guided answer at most"
    )
    parser.add_argument(
        "--bad-images", choices=("error", "skip"), default="error",
        help="pictures that are missing, broken, too large or of another size than their record says: an error that "
        "names them all, or lines without predictions (default error)",
    )  # fmt: skip
    parser.add_argument("--torch-dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    _add_prompt_flags(parser)
    parser.add_argument(
        "--backend",
        choices=("hf", "vllm", "openai"),
        default="hf",
        help="transformers; vLLM in this process; or an OpenAI-compatible server, of which --model is the tokenizer",
    )
    parser.add_argument(
        "--max-model-len", type=positive_int, help="vllm: longest prompt and answer (default: the model's)"
    )
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run Python code that comes with the checkpoint"
    )
    parser.add_argument("--base-url", help="openai: address of the server, such as http://127.0.0.1:8000/v1")
    parser.add_argument("--served-model", help="openai: the name the server knows the model by")
    parser.add_argument(
        "--api-key-env", metavar="NAME", help="openai: environment variable that holds the key"
    )


def _add_prompt_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "how the model is asked",
        "By default as it was trained; where a flag says otherwise, a warning shows both.",
    )
    group.add_argument("--prompt", metavar="TEXT", help="user message")
    group.add_argument(
        "--cut-prompt",
        type=positive_int,
        metavar="N",
        help="ask with the first N tokens of the user message alone",
    )
    group.add_argument(
        "--prompt-latents", metavar="FOLDER",
        help="read the user message as the vectors of this latent prefix: a checkpoint of variant latent_prefix, or "
        "what `coordexp model export-prefix` wrote (default: that of the checkpoint where it holds one; `none` asks in "
        "text)",
    )  # fmt: skip
    group.add_argument(
        "--keep-prob", type=float, metavar="P", help="of these vectors (default: as trained at last)"
    )
    group.add_argument("--system", metavar="TEXT", help="system message, or a .txt file; '' for none")
    group.add_argument(
        "--media-order", choices=("media_first", "text_first"), help="picture before or after the text"
    )
    group.add_argument(
        "--answer-form",
        choices=("coordjson", "coordjson_numbers", "qwen", "compact"),
        help="how answers are read: CoordJSON, the same with numbers, Qwen3-VL's own JSON (which a model without "
        "coordinate tokens that nobody has trained is taken to write), or names and coordinate tokens alone",
    )
    group.add_argument(
        "--object-field-order", choices=("desc_first", "geometry_first"), help="of an object's keys"
    )
    group.add_argument("--min-pixels", type=positive_int, metavar="N", help="smaller pictures are enlarged")
    group.add_argument(
        "--max-pixels", type=positive_int, metavar="N", help="larger pictures are made smaller"
    )


def run(args: argparse.Namespace) -> int:
    """Check everything, then show a bar and answer; returns the process exit code."""
    from coordexp.cli.console import progress
    from coordexp.inference.infer import Inference
    from coordexp.inference.settings import InferSettings

    settings = InferSettings(
        backend=args.backend,
        limit=args.limit,
        batch_size=args.batch_size,
        max_new_tokens=args.max_new_tokens,
        torch_dtype=args.torch_dtype,
        temperature=args.temperature,
        seed=args.seed,
        repetition_penalty=args.repetition_penalty,
        coord=args.coord,
        guided=args.guided,
        guided_max_objects=args.guided_max_objects,
        prompt=args.prompt,
        system=args.system,
        media_order=args.media_order,
        min_pixels=args.min_pixels,
        max_pixels=args.max_pixels,
        answer_form=args.answer_form,
        field_order=args.object_field_order,
        max_model_len=args.max_model_len,
        base_url=args.base_url,
        served_model=args.served_model,
        api_key_env=args.api_key_env,
        trust_remote_code=args.trust_remote_code,
        bad_images=args.bad_images,
        cut_prompt=args.cut_prompt,
        prompt_latents=args.prompt_latents,
        keep_prob=args.keep_prob,
    )
    job = Inference.prepare(args.model, args.data, args.output, settings)
    if args.max_new_tokens is None:
        print(f"--max-new-tokens {job.max_new_tokens}, from the longest ground truth of {args.data}")
    with job.opened(overwrite=args.overwrite) as log:
        if log.num_done == len(job.records):
            log.finish()
            print(f"{args.output} holds all {log.num_done} images already (--overwrite starts anew)")
            return EXIT_OK
        if log.num_done:
            print(f"{args.output} holds {log.num_done} of {len(job.records)} images; going on")
        backend, tokenizer = job.load_backend()
        with closing(backend), progress("images") as advance:
            job.answer(log, backend, tokenizer, on_images=advance)
    if log.num_cut:
        print(
            f"{log.num_cut} of {len(job.records)} answers were cut at the limit of {job.max_new_tokens} tokens; a "
            "higher --max-new-tokens lets them end, unless they repeat themselves"
        )
    if log.num_bad:
        print(
            f"{log.num_bad} of {len(job.records)} images have pictures that could not be used; `bad_picture` in their "
            f"lines of {args.output / 'gt_vs_pred.jsonl'} says why"
        )
    print(f"wrote {len(job.records)} images to {args.output}; next: coordexp score --run {args.output}")
    return EXIT_OK

"""`hbfp generate`: text from a trained GPT, written as it comes."""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

NAME = "generate"
HELP = "write text with a GPT that `hbfp train` trained, character by character"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", type=Path, help="checkpoint.pt or model.safetensors of `hbfp train --arch gpt`")
    parser.add_argument("--prompt", default="", metavar="TEXT", help="what it goes on from (default: a new line)")
    parser.add_argument(
        "--tokens", type=int, default=200, metavar="N", help="how many characters (default: %(default)s)"
    )
    parser.add_argument(
        "--temperature",
        type=float,
        default=0.8,
        metavar="T",
        help="0 takes the likeliest character each time, 1 draws by the model's own odds (default: %(default)s)",
    )
    parser.add_argument("--top-k", type=int, metavar="N", help="draw among the N likeliest (default: among all)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the draws (default: %(default)s)")
    parser.add_argument(
        "--exact",
        action="store_true",
        help="give the bits of a pass over the whole text at each step, which takes several times as long",
    )
    parser.add_argument("--json", action="store_true", help="print prompt, text and speed as JSON, at the end")


def run(arguments: argparse.Namespace) -> int:
    from hbfp.errors import HBFPError
    from hbfp.training.generation import Writer

    if not 0 <= arguments.seed < 2**63:
        raise HBFPError(f"--seed is a number of 0 or more, not {arguments.seed}")
    writer = Writer.load(arguments.checkpoint)
    how: dict[str, Any] = {
        "temperature": arguments.temperature,
        "top_k": arguments.top_k,
        "seed": arguments.seed,
        "exact": arguments.exact,
    }
    characters = writer.write(arguments.prompt, arguments.tokens, **how)
    if not arguments.json:
        sys.stdout.write(arguments.prompt)
        sys.stdout.flush()
        try:
            for character in characters:
                sys.stdout.write(character)
                sys.stdout.flush()
        finally:
            characters.close()
        sys.stdout.write("\n")
        return 0
    started = time.perf_counter()
    text = "".join(characters)
    seconds = time.perf_counter() - started
    result = {
        "checkpoint": str(arguments.checkpoint),
        "prompt": arguments.prompt,
        "text": text,
        **how,
        "tokens": len(text),
        "seconds": seconds,
        "tokens_per_second": len(text) / seconds if text else None,
    }
    print(json.dumps(result, indent=1))
    return 0

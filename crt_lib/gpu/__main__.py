"""`crt gpu` without typer: all that is to be measured on a GPU, in one command for a bare machine.

    python -m crt_lib.gpu --out results/gpu [--minutes 9] [--rehearse] [--only PART]

It needs torch, numpy, transformers, accelerate, tokenizers and safetensors with what these bring,
the checkout (the part decode reads results/small/crt2), and WikiText-2 in `CRT_DATA_ROOT` for the
part training. A second call goes on where the first one stopped. `--rehearse` runs all of it at toy
size on the CPU.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from crt_lib.files import InputError
from crt_lib.gpu.run import run_gpu


def main(words: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m crt_lib.gpu", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--out", type=Path, required=True, help="folder; a second call goes on")
    parser.add_argument("--minutes", type=float, default=9.0, help="in all, of this call")
    parser.add_argument("--rehearse", action="store_true", help="at toy size on the CPU")
    parser.add_argument("--only", action="append", default=[], help="only this part (repeatable)")
    given = parser.parse_args(words)
    try:
        status = run_gpu(given.out, minutes=given.minutes, rehearse=given.rehearse, only=given.only)
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        status = 2 if isinstance(error, InputError) else 1
    sys.exit(status)


if __name__ == "__main__":
    main()

"""`crt gpu` where there is no typer: all that is to be measured on a GPU, in one command.

    python -m crt_lib.gpu --out results/gpu [--minutes 9] [--rehearse] [--only PART]

A bare machine needs torch, numpy, transformers, accelerate, tokenizers and safetensors with what
these bring, the checkout (checks and the run that decodes are read from it), and WikiText-2 in
`CRT_DATA_ROOT` for the part training. A second call goes on where the first one stopped.
"""

import argparse
import sys
from pathlib import Path

from crt_lib.files import InputError
from crt_lib.gpu.run import PARTS, run_gpu

if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="crt gpu", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--out", type=Path, required=True, help="folder; a second call goes on")
    parser.add_argument("--minutes", type=float, default=9.0, help="in all, of this call")
    parser.add_argument("--rehearse", action="store_true", help="at toy size on the CPU")
    only = f"only this part (repeatable): {', '.join(PARTS)}"
    parser.add_argument("--only", action="append", default=[], help=only)
    try:
        sys.exit(run_gpu(**vars(parser.parse_args())))
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, InputError) else 1)

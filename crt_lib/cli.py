"""The command line, `crt`: its groups of commands, in the order that `crt --help` shows them."""

import sys

import typer

from crt_lib.commands import models, studies, training
from crt_lib.commands.bench import bench_app
from crt_lib.commands.options import PLAIN_HELP
from crt_lib.files import InputError, RunError

app = typer.Typer(
    help="CRT: recursive language models with early exit, reproduced, audited and corrected.",
    no_args_is_help=True,
    rich_markup_mode=None,
    context_settings=PLAIN_HELP,
    pretty_exceptions_enable=False,
    add_completion=False,
)
for group in (training, models, studies):
    app.add_typer(group.app)
app.add_typer(bench_app, name="bench")


def main() -> None:
    """Run the command line; bad input ends with one line on stderr and exit code 2."""
    try:
        app()
    except (InputError, RunError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        asked_for = (InputError, FileNotFoundError, NotADirectoryError, IsADirectoryError)
        sys.exit(2 if isinstance(error, asked_for) else 1)


if __name__ == "__main__":
    main()

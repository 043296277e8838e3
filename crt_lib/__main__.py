"""`python -m crt_lib`: the command line."""

from crt_lib.cli import main

if __name__ == "__main__":
    main()

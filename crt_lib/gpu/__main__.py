"""`python -m crt_lib.gpu`: the command without typer."""

from crt_lib.gpu.run import main

if __name__ == "__main__":
    main()

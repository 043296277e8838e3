"""`python -m crt_lib.gpu`: `crt gpu` where there is no typer."""

from crt_lib.gpu.run import main

if __name__ == "__main__":
    main()

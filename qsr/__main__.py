"""`python -m qsr` is the command `qsr`, for example under torchrun."""

from qsr.cli.command import main

if __name__ == "__main__":
    main()

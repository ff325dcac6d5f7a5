"""`python -m sparseout_experiments` is the command `sparseout`."""

from sparseout_experiments.cli import main

main()

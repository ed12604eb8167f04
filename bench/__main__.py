"""python -m bench is the fedara command; torchrun starts it so."""

from bench.cli import main

main()

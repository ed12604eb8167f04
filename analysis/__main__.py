"""`python -m analysis DIR`: what `fedara report DIR` does, where torch is not installed."""

from analysis.cli import app

app(prog_name="python -m analysis")

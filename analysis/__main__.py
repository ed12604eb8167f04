"""`python -m analysis`, the same command as `fedara report`."""

from analysis.cli import app

app(prog_name="python -m analysis")

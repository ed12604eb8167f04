"""Commands beside the runs."""

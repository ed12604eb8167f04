"""Micro-benchmarks: parts of a round, timed alone."""

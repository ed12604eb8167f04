"""Seconds, joules, memory, FLOPs and modelled devices."""

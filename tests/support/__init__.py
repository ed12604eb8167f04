"""Helpers of the tests: jobs in child processes, records made by hand."""

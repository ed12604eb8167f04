"""Figures and tables from the records of finished runs; reads files only, no torch."""

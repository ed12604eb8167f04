"""Records on disk into data frames."""

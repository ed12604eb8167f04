"""A config's rounds, from preparation to records."""

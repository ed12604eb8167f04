"""Everything that turns a config into records."""

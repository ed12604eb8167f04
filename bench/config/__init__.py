"""TOML files into validated configs."""

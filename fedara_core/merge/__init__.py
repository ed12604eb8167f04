"""How uploads of all processes are combined."""

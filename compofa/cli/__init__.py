"""The commands: they parse, call and exit."""

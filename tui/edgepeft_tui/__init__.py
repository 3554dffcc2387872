"""The terminal UI: it shows what the library knows and starts what the library can do."""

"""One command is one file: `arguments(parser)` and `command(options)`, which runs it."""

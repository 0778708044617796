"""The command line: one program, `nbdserver`. Imports stay lazy, so that `--help` answers at once."""

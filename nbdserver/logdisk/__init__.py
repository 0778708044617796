"""The log-structured disk: one log, two maps, one family a directory."""

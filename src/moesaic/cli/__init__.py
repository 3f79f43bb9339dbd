"""The command line: a short table of commands, each a thin module."""

"""The command line: `cli` and one file for each command. Nothing else in the package imports it."""

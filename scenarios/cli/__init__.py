"""The command line: a module a command. Entry point: `main`."""

"""The command line: one command per question. Entry point: `main`."""

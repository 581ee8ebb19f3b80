"""`python -m scenarios` is `servecast`."""

from scenarios.cli import main

main()

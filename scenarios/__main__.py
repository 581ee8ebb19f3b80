"""`python -m scenarios` is `servecast`."""

from scenarios.cli.main import main

main()

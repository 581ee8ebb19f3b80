"""`python -m servecast` is the command `servecast`."""

from scenarios.cli.main import main

main()

"""Engines: schedulers without a clock. `engine` says what one is; every other module is one server's scheduler."""

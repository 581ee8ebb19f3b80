"""A run: a table of requests, the rungs of its ladder, and (simulated) its steps. Measured and simulated alike.

On disk it is a directory: `run.json`, `requests.jsonl` (or `.gz`), and optionally `steps.jsonl` and `server.jsonl`.
Raw is kept here; every statistic is derived in `sim.results`. `run` has the values, `directory` reads and writes them.
"""

from sim.run.directory import plain_scenario, read_run, write_run
from sim.run.run import Run, Rung, taken_as

__all__ = ["Run", "Rung", "plain_scenario", "read_run", "taken_as", "write_run"]

"""The machine: what a server is asked, how it batches, how long its steps take, and what came of it.

Reading guide, from below: `steptime` says how long the work of a step takes; `model` has the values that all share
(scenario, workload, calibration, run) and their files; `engines` decide, without a clock, what the next steps compute;
`cluster` runs an engine and its clients on the clock; `results` reads the run that comes out; `replicate` makes many
of them. `terminal` prints.
"""

"""The machine: what a server is asked, how it batches, how long its steps take, and what came of it.

Reading guide, in the order in which things happen:

`scenario` and `workload` say what clients ask; `server` names the flags the router runs with; `engines` decide, without
a clock, what the next steps compute; `steptime` says how long that takes; `replica` runs an engine on the clock;
`clients` ask; `ladder` adds users rung by rung as a measurement does. What comes out is a `run`; `metrics` (with
`gaps`, and `events` where one carries several tokens) and `curve` read it; `sweep` makes many of them. `calibration`
holds the parameters, with their draws, that make the model one machine's and not another's.
"""

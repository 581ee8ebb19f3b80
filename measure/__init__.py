"""Climb the users ladder on a live server and leave a run. Reading guide, from what decides to what does:

`rung`       the phases of one load, and when each ends; why to stop the ladder  (no I/O)
`precision`  how well a window knows its throughput  (no I/O)
`watch`      what the load generator's reports add up to  (no I/O)
`dialect`    how TGI and OpenAI-style servers are asked, and what an event says  (no I/O)
`sse`        events out of bytes, however these are cut or packed  (no I/O)
`tokens`     which events carry tokens, and how many, by the server's count  (no I/O)
`prompts`    prompts of an exact length; `probe` finds out how, on the server at hand
`client`     one request: when each token came, what became of it; `trial` sends the first one
`worker`     the users of one process, their records, the canary
`locustfile` the load generator: locust's runners around workers; the only module that imports locust
`orders`     what ladder and generator say to each other; `generator` is the ladder's end of it
`ladder`     what comes before the first request and after the last; `ascent` climbs, `screen` shows it
`journal`    the run directory while it is written; `lines` makes its files survive a kill
`deadline`   one time limit for a whole phase, and the line that says what is waited for
`key` `refusal`  the API key, which reaches no file; why an answer is not what was asked for  (no I/O)
`endpoint` `health`  the server's address, its kind, its limits against the scenario
`scrape` `exposition` `witness`  the server's own metrics, and whether they agree with the streams
`container` `overlay` `doctor`  the server in docker, with answers as long as asked; what is missing for that
`standin` `routes` `answer` `realtime` `validation` `faults`  a stand-in for TGI 0.9.4, on `sim`'s engine

Entry points: `ladder.measure(scenario, url, out, ...)`, `standin.serve(host, port, calibration, ...)` and
`doctor.diagnose(scenario, url)`. Import the module you need: this package imports nothing by itself.
"""

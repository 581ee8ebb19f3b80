"""Measures a scenario on a live server and writes a run directory. Reading guide (modules marked * do no I/O):

`ladder`   runs the rungs. `session` is the entry point: everything before the first request and after the last.
           `runner` runs the ladder; `rung`* decides when each phase ends; `totals`* adds up reports; `precision`* is
           the precision of a window; `generator` controls the load generator's processes; `probe` finds how to make
           prompts; `trial` sends the first streamed request; `progress` prints.
`loadgen`  the load generator, a process of its own. `worker` runs the users of a process, `client` sends one request,
           `prompts`* makes prompts of an exact length, `messages`* are exchanged with the ladder, `locustfile` is the
           only module that imports locust.
`apis`     HTTP APIs*: `tgi` and `openai` implement `api`; `sse` parses events, `tokens` counts their tokens, `failure`
           and `http_error` describe errors.
`server`   the server under test. `endpoint` is HTTP to it, `detection` finds what it is, `limits` compares it with the
           scenario, `provenance` finds its engine and flags, `scrape` and `exposition` read its metrics, `cross_check`
           compares them with the streams, `docker` starts it (`tokenizer_patch` makes answers as long as requested),
           `doctor` checks this machine, `key` is the API key.
`standin`  stand-ins for servers: the engines of `sim` in real time.
`journal`  the run directory while it is written. `deadline`  one time limit for a whole phase.

Entry points: `ladder.session.measure`, `standin.server.serve` and `server.doctor.diagnose`. Import the module you need:
this package imports nothing by itself.
"""

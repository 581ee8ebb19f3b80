"""Parameters of the machine, with their uncertainty, through three doors into one file (`calibration.json`).

Reading guide. *From a run* (`fit` is the door): `steps` finds the server's schedule in the arrival times of all
tokens (`step_table` describes each step, `checks` warnings what a client cannot have seen, `usable` leaves out what
says nothing), `design` and `admission_timing` make it a regression problem, `prior` says what is believed beforehand,
`equations` take the machine's `moods` out of it, `regress` solves them and chooses the form, `components` finds the
moods, `uncertainty` says how sure the answer is, `noise`, `clocks` and `budget` what else was seen, `witness` what
the server counted itself; `unstreamed` is for runs without streams, `residuals` holds a run's steps against a fit,
`advise` says what to measure next. *From a table of step times* (`table`): `layout` reads it, `machines` keeps the
rows of one machine, `selection` decides which terms deserve a place. *From published figures* (`published`): `laws`
says what such a machine can be, `space` which of those show a lone user's latency, `figures` runs them through the
simulator, `search` chooses which, `verdict` says in words what came of it, and `recovery` tries the door on articles
made up. `draws` sums up joint draws.
"""

"""Fit the model's parameters, with their uncertainty, and write them to `calibration.json`.

Reading guide. `sources` has one module for each kind of data: `streamed` (runs with token times), `latency_only`
(runs without), `step_time_table` and `published` (figures that somebody printed). A streamed run goes through
`schedule`, which places token times on step ends (`align`), drives the engine through them (`follow`) and tables the
steps (`schedule`), leaves out what cannot be timed (`usable`, `checks`), compares with the server's counters
(`cross_check`) and reads client delays, admission timing and the token budget off it. It then goes through
`regression`: `design` makes rows and terms, `priors` adds pseudo-observations, `equations` eliminates the random
effects, `fit` solves and selects a form, `variance_components` estimates drift, rung and run effects, `posterior`
draws jointly; `step_noise`, `residuals` and `identifiability` describe what is left. `next_measurement` says which
load to measure next. `coverage` tests the intervals that published figures give.
"""

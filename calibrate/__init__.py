"""Parameters of the machine, with their uncertainty, through three doors into one file (`calibration.json`).

Reading guide. *From a run*: `steps` finds the server's schedule in the arrival times of all tokens, `fit` turns the
steps into parameters, `uncertainty` says how sure they are. *From a table of step times*: `layout` reads it, `machines`
keeps the rows of one machine, `selection` decides which terms deserve a place, `table` fits. *From published figures*:
`prior` says what such a machine can be, `published` finds which of those, run through the simulator, show the figures.
`draws` sums up joint draws for all three.
"""

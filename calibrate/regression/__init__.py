"""Regression of step durations on the terms of `sim.steptime.basis`: random effects, priors, joint draws."""

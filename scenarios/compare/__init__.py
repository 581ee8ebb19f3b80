"""Measured against simulated, and any two runs or forecasts against each other."""

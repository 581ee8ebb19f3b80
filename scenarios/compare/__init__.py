"""How good is a forecast? Measured runs against their forecasts, and any two runs or forecasts."""

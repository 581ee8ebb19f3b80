"""The stand-in for text-generation-inference 0.9.4: routes, validation, events and metrics."""

"""The server under test: its address, health, flags and metrics, and docker to start it."""

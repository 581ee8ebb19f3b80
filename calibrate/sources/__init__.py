"""What parameters can be fitted to: streamed runs, latency-only runs, tables of step times, published figures."""

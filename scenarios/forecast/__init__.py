"""What a scenario will do: latencies, rates, cost, SLOs, what limits the server, and warnings."""

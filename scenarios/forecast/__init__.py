"""What a scenario will do: latencies, rates, cost, SLOs, what limits the server, and what to doubt of it."""

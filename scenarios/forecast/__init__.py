"""What will a scenario do? Forecasts: latencies, rates, cost, SLOs, bottlenecks, and warnings."""

"""What the table of a run's requests says: latencies, rates, gaps between tokens, curves over load."""

"""The load generator: users that send requests and record when each token came."""

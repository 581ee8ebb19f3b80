"""The server's schedule, from what clients saw: which step made each token, and what else it computed."""

"""The server's schedule, rebuilt from what clients saw: which step made each token, and who was in it."""

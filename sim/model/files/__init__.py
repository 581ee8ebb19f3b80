"""Files: read with an end in sight and errors that name a line and a key, written in one piece."""

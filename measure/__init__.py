"""Climb the users ladder on a live server and leave a run."""

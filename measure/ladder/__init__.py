"""The ladder on a live server: the phases of a rung, when each ends, why to stop; from trial request to closed run."""

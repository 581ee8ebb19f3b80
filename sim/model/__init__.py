"""Values and their files: what is asked, of what, with which parameters, and what came of it. No clock, no policy."""

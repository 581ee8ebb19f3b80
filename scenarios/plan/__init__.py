"""Which option meets the SLOs, with what probability, at what cost? Options in; tests, a search and an answer out."""

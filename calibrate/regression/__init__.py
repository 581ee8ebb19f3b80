"""Step times by regression: the design matrix, priors, random effects, the fit and its posterior."""

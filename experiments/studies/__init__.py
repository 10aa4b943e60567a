"""Studies: each has a question, an expectation, a sweep with seeds, what was seen, and tables under `results/`."""

"""Studies: a question, what is expected, a sweep with seeds, what was seen, and its tables under `results/`."""

"""Our own decoder: its modules and the numbers that fix it."""

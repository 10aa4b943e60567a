"""The parts that every experiment is made of."""

"""The parts that all experiments share."""

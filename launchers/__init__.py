"""The commands: absl apps that turn flags into an experiment graph and run it."""

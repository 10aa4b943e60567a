"""Experiments as functions that return `fdl.Config`; the only folder besides `launchers` that knows Fiddle."""

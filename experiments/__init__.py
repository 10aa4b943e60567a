"""Experiments as functions that return `fdl.Config`; the only folder that knows Fiddle."""

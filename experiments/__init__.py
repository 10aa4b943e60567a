"""Experiments as functions that return `fdl.Config`. Only this folder imports Fiddle."""

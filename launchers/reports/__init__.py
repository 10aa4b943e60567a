"""Runs and records as tables and pages."""

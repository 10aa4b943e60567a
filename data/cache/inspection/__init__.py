"""Inspection of caches: every byte verified, sizes by part, and records as text."""

"""The experiment graph by text: names, items, paths, records."""

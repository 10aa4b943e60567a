"""The teacher cache: its format, how it is written (`export`), how it is read (`stream`)."""

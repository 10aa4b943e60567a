"""The decoder of students: its modules and its architecture."""

"""Starts: first weights of a student, from a folder or random, whole or trained in part."""

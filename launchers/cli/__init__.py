"""Flags, help, errors and checks that all commands share."""

"""Replay: record a program with all that enters it, run it again without the world, and say where it differs."""

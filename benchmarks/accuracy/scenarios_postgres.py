"""Faults of a real database: PostgreSQL with a payments schema (see `database`)."""

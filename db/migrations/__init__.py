"""Alembic migrations of the votes database."""

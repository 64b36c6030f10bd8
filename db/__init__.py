"""Floor 0: SQL through SQLAlchemy. No torch, no web."""

"""Floor 2: the rating room. db and base_models.audio only; it never loads torch."""

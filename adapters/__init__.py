"""Floor 1: LoRA adapters for music: attach, store, check, compose. On base_models and db."""

"""Families of models: for each one how its `config.json`, its weights and its transformer block differ from Llama's."""

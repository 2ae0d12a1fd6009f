"""Configuration: Hydra's YAML, parsed once into frozen dataclasses. No torch."""

"""A training's folder: what made it, and reading it again."""

"""The model for transformers, its export, and models from elsewhere."""

"""What a model costs and what its predictions depend on, for any model."""

"""Products with the model's matrices and its routed experts."""

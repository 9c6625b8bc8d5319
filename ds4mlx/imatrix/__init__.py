"""Importances of the routed experts' columns, collected by running the model."""

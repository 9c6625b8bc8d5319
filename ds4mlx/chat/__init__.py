"""Chat encoding."""

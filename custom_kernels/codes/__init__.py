"""How each storage format's codes are read inside a kernel."""

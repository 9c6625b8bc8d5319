"""What a directory of weights holds: every tensor's name, shape, kind and place."""

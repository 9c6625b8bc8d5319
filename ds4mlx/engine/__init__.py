"""From a directory and a prompt to text: loading, prefill, steps, sampling, conversations."""

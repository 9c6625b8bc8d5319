"""The model: embedding, blocks, head and draft blocks, each part by its name in the paper."""

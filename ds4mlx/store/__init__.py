"""The disk KV store: a long prompt is prefilled once. See `KVStore`."""

from ds4mlx.store.kv_store import KVStore

__all__ = ["KVStore"]

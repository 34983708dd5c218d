"""Keys and values of attention in few bits while a model runs in transformers."""

from casp_plugin.kv_cache.cache import CompressedCache
from casp_plugin.kv_cache.running import with_kv_cache
from casp_plugin.kv_cache.schemes import CacheScheme

__all__ = ["CacheScheme", "CompressedCache", "with_kv_cache"]

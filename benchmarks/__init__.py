"""Speed and memory of compressed caches."""

"""Long-context accuracy of compressed caches against baselines."""

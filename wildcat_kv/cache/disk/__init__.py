"""Caches on disk: one safetensors file each."""

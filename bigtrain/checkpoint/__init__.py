"""Checkpoints as sets of named blocks: safetensors files and one JSON manifest, no pickle."""

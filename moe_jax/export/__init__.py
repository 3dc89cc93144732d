"""Converts checkpoints to and from Hugging Face's sharded safetensors."""

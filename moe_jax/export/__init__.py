"""Exchange with Hugging Face: checkpoints to and from sharded safetensors."""

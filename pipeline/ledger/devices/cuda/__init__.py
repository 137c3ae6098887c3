"""NVIDIA's devices, and AMD's where torch drives them under the same name."""

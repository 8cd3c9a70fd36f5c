"""diffusers: a pipeline in, a quantized pipeline out, and its checkpoint on disk."""

"""What a model or adapter folder says about itself: config.json, safetensors headers, tokenizer files, nothing else.

No MLX, no transformers and no pydantic: a folder takes milliseconds, and a process that prints estimates stays small.
"""

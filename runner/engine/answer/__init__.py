"""What a model writes, taken apart: reasoning, tool calls, and the text that is left."""

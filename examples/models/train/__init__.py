"""Makes the demo models: the text, the tokenizer, the training and the figures."""

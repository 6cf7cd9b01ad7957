"""Two frozen models made comparable: loading, tokenizers, shared vocabulary, alignment."""

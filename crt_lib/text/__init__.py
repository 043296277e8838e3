"""Text: corpora, tokenizers, and what is counted of them."""

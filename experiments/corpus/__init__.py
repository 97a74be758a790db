"""What `revival_corpus.py` is made of, beside the list, the tokenizer and the record of the corpus."""

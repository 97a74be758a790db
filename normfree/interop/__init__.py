"""The way in and out: Hugging Face models of the GPT-2 and GPT-NeoX families."""

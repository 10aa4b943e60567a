"""Hugging Face folders, PEFT folders and GGUF files, read and written."""

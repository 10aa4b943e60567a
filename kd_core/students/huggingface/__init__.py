"""Reading and writing of Hugging Face folders and PEFT folders, and conversion of GGUF files."""

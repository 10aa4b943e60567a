"""Corpora: files → rows → documents → token ids and loss masks → windows."""

"""Files → rows → documents → token ids and loss mask → windows."""

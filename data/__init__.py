"""Teacher caches: their format (`cache`), how they are written (`export`) and how they are read (`stream`)."""

"""A sweep's points, its folder, the queues that run them, and the tables that compare them."""

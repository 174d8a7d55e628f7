"""A simulated card, and the tests that run the commands on it."""

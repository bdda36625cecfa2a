"""What a user would pick instead: each peer on the same inputs, exactness before speed."""

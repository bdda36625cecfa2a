"""What a GPU can show in minutes, and what is predicted without one."""

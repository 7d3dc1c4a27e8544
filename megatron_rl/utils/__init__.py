"""Small helpers that every other room may use: files, memory, heartbeats, sockets."""

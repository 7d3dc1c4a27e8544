"""Small helpers that every other room may use: text formats, files, memory, heartbeats, requests, rendezvous."""

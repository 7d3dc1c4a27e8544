"""What all HTTP servers have in common: their process, requests, liveness and router."""

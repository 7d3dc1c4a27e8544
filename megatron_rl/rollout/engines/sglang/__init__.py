"""SGLang: the client of its server, and our code that runs inside the server."""

"""SGLang: its server, and the code that runs inside it."""

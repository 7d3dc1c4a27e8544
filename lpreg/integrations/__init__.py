"""lpreg in other people's trainers. Each module imports the library it is named after; nothing else here does."""

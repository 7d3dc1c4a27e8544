"""lpreg in other trainers. Only the modules of a library's name import that library."""

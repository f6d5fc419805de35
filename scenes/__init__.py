"""The generated world of the default run: pictures.py draws and reads, language.py describes."""

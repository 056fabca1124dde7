"""The bundled demo model: its text generator, its training script and the trained files."""

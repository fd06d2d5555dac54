"""Network families and definitions: tables and layer shapes, without torch."""

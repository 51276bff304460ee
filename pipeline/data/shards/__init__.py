"""Records to Arrow files and back."""

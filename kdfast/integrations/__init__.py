"""Outside libraries, one file each, imported when used."""
